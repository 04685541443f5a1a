rule lookup:
    input:
        store=rules.store.output.store,
        tree=CONFIG.annotate.tree or [],
    output:
        found=temp(directory(f"{ATLAS}/lookup")),
        decisions=update(f"{ATLAS}/decisions/lookup.jsonl"),
    log:
        f"{ATLAS}/logs/lookup.log",
    benchmark:
        f"{ATLAS}/benchmarks/lookup.tsv"
    threads: 1
    resources:
        mem_mb=megabytes(340, (0.8, ANY)),
        runtime=minutes(10, 0.02),
    params:
        store=subpath(input.store, parent=True),
        config=part("seed", "model", "train", "annotate"),  # where the registry is says the environment: no matter to results
    shell:
        "scvi-core lookup --store {params.store:q} --config {params.config:q} --out {output.found:q}"
        " --decisions {output.decisions:q} 2> {log:q}"


# The checkpoint of an unfinished fit is no declared output: Snakemake deletes those before another attempt.
rule train:
    input:
        store=rules.store.output.store,
        found=rules.lookup.output.found,
        tree=CONFIG.annotate.tree or [],
    output:
        weights=update(f"{ATLAS}/model/model.safetensors"),
        card=update(f"{ATLAS}/model/model.json"),
        history=update(f"{ATLAS}/model/history.parquet"),
        run=update(f"{ATLAS}/logs/train_run.json"),
        decisions=update(f"{ATLAS}/decisions/train.jsonl"),
    log:
        f"{ATLAS}/logs/train.log",
    benchmark:
        f"{ATLAS}/benchmarks/train.tsv"
    threads: CONFIG.threads
    resources:
        mem_mb=megabytes(
            (390 + DRIVER) * CONFIG.devices,
            (3.2 * CONFIG.devices, MOST * CONFIG.devices),
        ),
        runtime=minutes(120, 0.2),  # four times what two cores took
        card=CARD,
        gpu=0 if CONFIG.device == "cpu" else CONFIG.devices,
        # two minutes before time is up Slurm asks for a checkpoint: SIGTERM, for which the Snakemake around it waits
        slurm_extra="--signal=TERM@120",
    params:
        store=subpath(input.store, parent=True),
        model=subpath(output.weights, parent=True),
        config=part(
            "seed",
            "threads",
            "device",
            "model",
            "train",
            "annotate",
            drop=["model.reuse"],
        ),
        checkpoints=f"{ATLAS}/.checkpoints",
        devices=CONFIG.devices,
    shell:
        # exec: the signal would end a shell in between before the checkpoint is written
        "exec scvi-core train --store {params.store:q} --found {input.found:q} --config {params.config:q} --out {params.model:q}"
        " --run {output.run:q} --checkpoints {params.checkpoints:q} --devices {params.devices} --decisions {output.decisions:q}"
        " 2> {log:q}"
