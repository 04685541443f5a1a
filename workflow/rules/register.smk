rule register:
    input:
        model=rules.train.output.weights,
        run=rules.train.output.run,
        cells=cells_by(),
        clusters=rules.cluster.output.clusters,
    output:
        update(f"{ATLAS}/model_ref.json"),
    log:
        f"{ATLAS}/logs/register.log",
    benchmark:
        f"{ATLAS}/benchmarks/register.tsv"
    threads: 1
    resources:
        mem_mb=megabytes(290, (23, ANY), of="cells"),
        runtime=10,
    params:
        folder=subpath(output[0], parent=True),
        config=part(
            *(
                set(type(CONFIG).model_fields)
                - {
                    "samples",
                    "annotations",
                    "cluster",
                    "contrast",
                    "criticism",
                    "de",
                    "report",
                    "export",
                }
            )
        ),
    shell:
        "scvi-core register {params.folder:q} --config {params.config:q} --out {output:q} 2> {log:q}"
