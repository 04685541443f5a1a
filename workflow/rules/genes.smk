rule genes:
    input:
        counts=expand(rules.ingest.output.counts, sample=SAMPLES),
        qc=expand(rules.qc.output.qc, sample=SAMPLES),
    output:
        genes=update(f"{ATLAS}/genes.parquet"),
        decisions=update(f"{ATLAS}/decisions/genes.jsonl"),
    log:
        f"{ATLAS}/logs/genes.log",
    benchmark:
        f"{ATLAS}/benchmarks/genes.tsv"
    threads: 1
    resources:
        mem_mb=megabytes(310, (0.11, ANY)),
        runtime=minutes(15, 0.05),
    params:
        samples=lambda wildcards, input: os.path.dirname(
            os.path.dirname(input.counts[0])
        ),
        # not each of them: a command's line has an end
        config=part("input.genes", "genes"),
    shell:
        "scvi-core genes {params.samples:q} --config {params.config:q} --out {output.genes:q}"
        " --decisions {output.decisions:q} 2> {log:q}"


rule store:
    input:
        counts=expand(rules.ingest.output.counts, sample=SAMPLES),
        qc=expand(rules.qc.output.qc, sample=SAMPLES),
        genes=rules.genes.output.genes,
    output:
        store=update(f"{ATLAS}/counts.zarr/.zattrs"),  # stands for the folder: holds its digest
        decisions=update(f"{ATLAS}/decisions/store.jsonl"),
    log:
        f"{ATLAS}/logs/store.log",
    benchmark:
        f"{ATLAS}/benchmarks/store.tsv"
    threads: 1
    resources:
        mem_mb=megabytes(240, (3, 90), (0.25, ANY)),
        runtime=minutes(10, 0.05),
    params:
        store=subpath(output.store, parent=True),
        samples=lambda wildcards, input: os.path.dirname(
            os.path.dirname(input.counts[0])
        ),
        config=json.dumps(
            {
                "input": {"metadata": carried(CONFIG, SAMPLES.values())},
            }
        ),
    shell:
        "scvi-core store {params.samples:q} --genes {input.genes:q} --config {params.config:q} --out {params.store:q}"
        " --decisions {output.decisions:q} 2> {log:q}"
