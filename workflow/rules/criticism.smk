rule criticism:
    input:
        store=rules.store.output.store,
        model=rules.train.output.weights,
        cells=cells_by(CONFIG.de.groupby),
        clusters=rules.cluster.output.clusters,
    output:
        checks=update(f"{ATLAS}/criticism/checks.json"),
        genes=update(f"{ATLAS}/criticism/genes.parquet"),
        cells=update(f"{ATLAS}/criticism/cells.parquet"),
        groups=update(f"{ATLAS}/criticism/groups.parquet"),
        de=update(f"{ATLAS}/criticism/de.parquet"),
        decisions=update(f"{ATLAS}/decisions/criticism.jsonl"),
    log:
        f"{ATLAS}/logs/criticism.log",
    benchmark:
        f"{ATLAS}/benchmarks/criticism.tsv"
    threads: CONFIG.threads
    resources:
        mem_mb=megabytes(220 + 170 * SIDE, (3.2, MOST), (0.4, ANY)),
        runtime=minutes(20, 0.1),
        card=CARD,
    params:
        store=subpath(input.store, parent=True),
        model=subpath(input.model, parent=True),
        folder=subpath(output.checks, parent=True),
        config=part(
            "seed",
            "threads",
            "device",
            "train.memory_gb",
            "de.groupby",
            "criticism",
            drop=NO_GPU,
        ),
    shell:
        "scvi-core criticism --store {params.store:q} --model {params.model:q} --cells {input.cells:q}"
        " --config {params.config:q} --out {params.folder:q} --decisions {output.decisions:q} 2> {log:q}"
