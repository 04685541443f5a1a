# asked for by export.h5ad
rule export:
    input:
        counts=expand(rules.ingest.output.counts, sample=SAMPLES),
        qc=expand(rules.qc.output.qc, sample=SAMPLES),
        genes=rules.genes.output.genes,
        model=rules.train.output.card,
        latent=rules.embed.output[0],
        cells=rules.cells.output.cells,
    output:
        update(f"{ATLAS}/atlas.h5ad"),
    log:
        f"{ATLAS}/logs/export.log",
    benchmark:
        f"{ATLAS}/benchmarks/export.tsv"
    threads: CONFIG.threads
    resources:
        mem_mb=megabytes(400, (300 * GRAPH / CONFIG.model.n_latent, ANY), of="latent"),
        runtime=minutes(20, 1),
    params:
        folder=subpath(output[0], parent=True),
        config=part(
            "atlas",
            "seed",
            "threads",
            "cluster.n_neighbors",
            "registry.name",
            "export.genes",
            "export.x",
        ),
    shell:
        "scvi-core export {params.folder:q} --config {params.config:q} --out {output:q} 2> {log:q}"
