rule de:
    input:
        store=rules.store.output.store,
        model=rules.train.output.weights,
        cells=cells_by(CONFIG.de.groupby),
        clusters=rules.cluster.output.clusters,
    output:
        de=update(f"{ATLAS}/de.parquet"),
        decisions=update(f"{ATLAS}/decisions/de.jsonl"),
    log:
        f"{ATLAS}/logs/de.log",
    benchmark:
        f"{ATLAS}/benchmarks/de.tsv"
    threads: CONFIG.threads
    resources:
        mem_mb=megabytes(460, (3.2, MOST), (1.6, ANY)),
        runtime=minutes(20, 0.2),
        card=CARD,
    params:
        store=subpath(input.store, parent=True),
        model=subpath(input.model, parent=True),
        config=part("seed", "threads", "device", "train.memory_gb", "de", drop=NO_GPU),
    shell:
        "scvi-core de --store {params.store:q} --model {params.model:q} --cells {input.cells:q} --config {params.config:q}"
        " --out {output.de:q} --decisions {output.decisions:q} 2> {log:q}"
