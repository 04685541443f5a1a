rule ingest:
    input:
        source,
    output:
        counts=update(f"{ATLAS}/samples/{{sample}}/counts.h5ad"),
        decisions=update(f"{ATLAS}/decisions/ingest.{{sample}}.jsonl"),
    log:
        f"{ATLAS}/logs/ingest.{{sample}}.log",
    benchmark:
        f"{ATLAS}/benchmarks/ingest.{{sample}}.tsv"
    threads: 1
    resources:
        mem_mb=megabytes(200, (10, 200)),
        runtime=minutes(10, 0.05),
    params:
        batch=lambda wildcards: SAMPLES[wildcards.sample].batch,
        source=lambda wildcards: SAMPLES[wildcards.sample].path,
        metadata=lambda wildcards: json.dumps(SAMPLES[wildcards.sample].metadata),
        config=reading,
        given=given,  # so that it re-runs where times tell nothing
    shell:
        "scvi-core ingest --sample {wildcards.sample:q} --batch {params.batch:q} --metadata {params.metadata:q}"
        " --source {params.source:q} --config {params.config:q} --out {output.counts:q} --decisions {output.decisions:q}"
        " -- {input:q} 2> {log:q}"
