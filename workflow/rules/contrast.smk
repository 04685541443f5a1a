# asked for where contrast.tests names any
rule contrast:
    input:
        counts=expand(rules.ingest.output.counts, sample=SAMPLES),
        qc=expand(rules.qc.output.qc, sample=SAMPLES),
        genes=rules.genes.output.genes,
        cells=cells_by(CONFIG.contrast.within),
        clusters=rules.cluster.output.clusters,
    output:
        contrast=update(f"{ATLAS}/contrast.parquet"),
        pseudobulk=update(f"{ATLAS}/pseudobulk.parquet"),
        decisions=update(f"{ATLAS}/decisions/contrast.jsonl"),
    log:
        f"{ATLAS}/logs/contrast.log",
    benchmark:
        f"{ATLAS}/benchmarks/contrast.tsv"
    threads: 1
    resources:
        mem_mb=megabytes(2400, (4, ANY)),
        runtime=minutes(30 + 30 * len(CONFIG.contrast.tests), 0.2),
    params:
        samples=lambda wildcards, input: os.path.dirname(
            os.path.dirname(input.counts[0])
        ),
        config=part("contrast"),
    shell:
        "scvi-core contrast {params.samples:q} --cells {input.cells:q} --genes {input.genes:q} --config {params.config:q}"
        " --out {output.contrast:q} --pseudobulk {output.pseudobulk:q} --decisions {output.decisions:q} 2> {log:q}"
