# asked for by annotate.label
rule annotate:
    input:
        store=rules.store.output.store,
        model=rules.train.output.weights,
    output:
        annotation=update(f"{ATLAS}/annotation.parquet"),
        probabilities=update(f"{ATLAS}/label_probabilities.parquet"),
        labels=update(f"{ATLAS}/labels.parquet"),
        decisions=update(f"{ATLAS}/decisions/annotate.jsonl"),
    log:
        f"{ATLAS}/logs/annotate.log",
    benchmark:
        f"{ATLAS}/benchmarks/annotate.tsv"
    threads: CONFIG.threads
    resources:
        mem_mb=megabytes(460, (3.2, MOST)),
        runtime=minutes(20, 0.2),
        card=CARD,
    params:
        store=subpath(input.store, parent=True),
        model=subpath(input.model, parent=True),
        config=part("threads", "device", "train.memory_gb", drop=NO_GPU),
    shell:
        "scvi-core annotate --store {params.store:q} --model {params.model:q} --config {params.config:q}"
        " --out {output.annotation:q} --probabilities {output.probabilities:q} --labels {output.labels:q}"
        " --decisions {output.decisions:q} 2> {log:q}"
