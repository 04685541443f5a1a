rule report:
    input:
        qc=expand(rules.qc.output.qc, sample=SAMPLES),
        genes=rules.genes.output.genes,
        store=rules.store.output.store,
        model=rules.train.output.weights,
        latent=rules.embed.output,
        loadings=rules.loadings.output if CONFIG.model.decoder == "linear" else [],
        cells=rules.cells.output.cells,
        annotation=rules.annotate.output if CONFIG.annotate.label else [],
        de=rules.de.output.de,
        contrast=(
            [rules.contrast.output.contrast, rules.contrast.output.pseudobulk]
            if CONFIG.contrast.tests
            else []
        ),
        criticism=rules.criticism.output if CONFIG.criticism.enabled else [],
        reference=rules.register.output,
        h5ad=rules.export.output if CONFIG.export.h5ad else [],  # the manifest lists it
    output:
        page=report(
            update(f"{ATLAS}/report.html"),
            caption="../report/atlas.rst",
            category="Atlas",
        ),
        metrics=update(f"{ATLAS}/metrics.json"),
        decisions=update(f"{ATLAS}/decisions.jsonl"),
        manifest=update(f"{ATLAS}/manifest.json"),
        figures=report(
            update(directory(f"{ATLAS}/figures")),  # users may keep pictures there
            patterns=["{figure}.png"],
            caption="../report/figure.rst",
            category="Figures",
            labels={"figure": "{figure}"},
        ),
    log:
        f"{ATLAS}/logs/report.log",
    benchmark:
        f"{ATLAS}/benchmarks/report.tsv"
    threads: CONFIG.threads
    resources:
        mem_mb=megabytes(300 + 200 * SIDE, (1.4, ANY)),
        runtime=minutes(15, 0.05),
    params:
        folder=subpath(output[0], parent=True),
        config=part(*type(CONFIG).model_fields),
    shell:
        "scvi-core report {params.folder:q} --config {params.config:q} 2> {log:q}"
