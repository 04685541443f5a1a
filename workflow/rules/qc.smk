rule qc:
    input:
        rules.ingest.output.counts,
    output:
        qc=update(f"{ATLAS}/samples/{{sample}}/qc.parquet"),
        figure=report(
            update(f"{ATLAS}/samples/{{sample}}/qc.png"),
            caption="../report/qc.rst",
            category="Quality control",
            labels={"sample": "{sample}"},
        ),
        decisions=update(f"{ATLAS}/decisions/qc.{{sample}}.jsonl"),
    log:
        f"{ATLAS}/logs/qc.{{sample}}.log",
    benchmark:
        f"{ATLAS}/benchmarks/qc.{{sample}}.tsv"
    threads: 1
    resources:
        mem_mb=megabytes(300, (16, 260), (2, 400), (0.4, ANY)),
        runtime=minutes(15, 0.2),
    params:
        config=part("qc", "seed"),
    shell:
        "scvi-core qc {input:q} --config {params.config:q} --out {output.qc:q} --figure {output.figure:q}"
        " --decisions {output.decisions:q} 2> {log:q}"
