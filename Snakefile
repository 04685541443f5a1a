# `snakemake --cores 4` in the repository's root builds the atlas of config/config.yaml, or of --configfile FILE.
include: "workflow/Snakefile"


rule atlas:
    default_target: True
    input:
        rules.all.input,
