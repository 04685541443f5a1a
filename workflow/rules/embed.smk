rule embed:
    input:
        store=rules.store.output.store,
        model=rules.train.output.weights,
    output:
        update(f"{ATLAS}/latent.parquet"),
    log:
        f"{ATLAS}/logs/embed.log",
    benchmark:
        f"{ATLAS}/benchmarks/embed.tsv"
    threads: CONFIG.threads
    resources:
        mem_mb=megabytes(390, (3.2, MOST)),
        runtime=minutes(10, 0.1),
        card=CARD,
    params:
        store=subpath(input.store, parent=True),
        model=subpath(input.model, parent=True),
        config=part("threads", "device", "train.memory_gb", drop=NO_GPU),
    shell:
        "scvi-core embed --store {params.store:q} --model {params.model:q} --config {params.config:q} --out {output:q}"
        " 2> {log:q}"


# asked for where the decoder is linear: a network has no loadings
rule loadings:
    input:
        rules.train.output.weights,
    output:
        update(f"{ATLAS}/loadings.parquet"),
    log:
        f"{ATLAS}/logs/loadings.log",
    benchmark:
        f"{ATLAS}/benchmarks/loadings.tsv"
    threads: 1
    resources:
        mem_mb=megabytes(400, (2, ANY)),
        runtime=minutes(10, 0.01),
    params:
        model=subpath(input[0], parent=True),
    shell:
        "scvi-core loadings --model {params.model:q} --out {output:q} 2> {log:q}"


# neighbours of a cell that are in memory, in units of the default's
GRAPH = (
    max(15, CONFIG.cluster.n_neighbors, 90 if CONFIG.cluster.tsne is True else 0) / 15
)


rule cluster:
    input:
        store=rules.store.output.store,
        latent=rules.embed.output[0],
    output:
        clusters=update(f"{ATLAS}/clusters.parquet"),
        decisions=update(f"{ATLAS}/decisions/cluster.jsonl"),
    log:
        f"{ATLAS}/logs/cluster.log",
    benchmark:
        f"{ATLAS}/benchmarks/cluster.tsv"
    threads: CONFIG.threads
    resources:
        mem_mb=megabytes(300, (630 * GRAPH / CONFIG.model.n_latent, ANY), of="latent"),
        runtime=minutes(20, 1),
    params:
        store=subpath(input.store, parent=True),
        config=part("seed", "threads", "cluster"),
    shell:
        "scvi-core cluster --store {params.store:q} --latent {input.latent:q} --config {params.config:q}"
        " --out {output.clusters:q} --decisions {output.decisions:q} 2> {log:q}"


# apart from clustering, so that another name clusters nothing anew
rule cells:
    input:
        store=rules.store.output.store,
        clusters=rules.cluster.output.clusters,
        names=CONFIG.annotations or [],
        annotation=rules.annotate.output.annotation if CONFIG.annotate.label else [],
    output:
        cells=update(f"{ATLAS}/cells.parquet"),
        decisions=update(f"{ATLAS}/decisions/cells.jsonl"),
    log:
        f"{ATLAS}/logs/cells.log",
    benchmark:
        f"{ATLAS}/benchmarks/cells.tsv"
    threads: 1
    resources:
        mem_mb=megabytes(300, (60, ANY), of="clusters"),
        runtime=minutes(10, 0.05),
    params:
        store=subpath(input.store, parent=True),
        config=part("annotations"),
        given=stamp(CONFIG.annotations) if CONFIG.annotations else "",  # as of ingest
        annotation=(
            ["--annotation", rules.annotate.output.annotation]
            if CONFIG.annotate.label
            else []
        ),
    shell:
        "scvi-core cells --store {params.store:q} --clusters {input.clusters:q} {params.annotation:q} --config {params.config:q}"
        " --out {output.cells:q} --decisions {output.decisions:q} 2> {log:q}"
