"""What a changed key of the configuration re-runs: read off all rules' parameters, and told in config/README.md."""

import json
import os
import re
import shlex

from _project import CONFIG, ROOT, changed, make, snakemake

from scvi_core.config import Config, Section

README = ROOT / "config" / "README.md"
BEGIN, END = "<!-- made by tests/workflow/test_reruns.py -->\n", "<!-- to here -->\n"
# so that every rule is there
TESTS = [{"column": "donor", "group": "d1", "reference": "d2"}]
WHOLE = changed(CONFIG, model__decoder="linear", contrast__tests=TESTS, export__h5ad=True, annotate__label="donor")
SHEET = {
    "sample": list("abcd"),
    "path": ["data/a.h5ad", "data/b", "data/c.csv.gz", "data/a.h5ad"],
    "batch": list("abcd"),
    "donor": ["d1", "d1", "d2", "d2"],
}


def leaves(model=Config, prefix=()):
    """Every key of the configuration, as a path."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from leaves(kind, (*prefix, name))
        else:
            yield (*prefix, name)


def has(config, path):
    for key in path:
        if not isinstance(config, dict) or key not in config:
            return False
        config = config[key]
    return True


def jobs(folder):
    """Rule -> (keys that its command is given, rules that make its inputs), in an order in which they may run."""
    done = snakemake(folder, "-n", "-p", "--forceall")
    assert done.returncode == 0, done.stdout + done.stderr
    rules, made = {}, {}
    blocks = re.findall(r"^(?:local)?rule (\w+):\n(.*?)(?=^\[|\Z)", done.stdout + done.stderr, re.MULTILINE | re.DOTALL)
    for rule, text in blocks:
        found = re.search(r"^Shell command: (?:exec )?(scvi-core .*)$", text, re.MULTILINE)
        if found is None:  # the target
            continue
        files = {}
        for key in ("input", "output"):
            line = re.search(rf"^    {key}: (.*)$", text, re.MULTILINE)[1]
            files[key] = re.sub(r" \(\w+\)", "", line).split(", ")
        command = shlex.split(found[1])
        given = json.loads(command[command.index("--config") + 1]) if "--config" in command else {}
        keys = {path for path in leaves() if has(given, path)} | ({("devices",)} if "--devices" in command else set())
        known, parents = rules.setdefault(rule, (set(), set()))
        known.update(keys)
        parents.update(made[file] for file in files["input"] if file in made)
        made.update(dict.fromkeys(files["output"], rule))
    depth = {}
    for rule, (_, parents) in rules.items():  # parents come first
        depth[rule] = 1 + max((depth[parent] for parent in parents), default=0)
    return {rule: rules[rule] for rule in sorted(rules, key=lambda rule: (depth[rule], rule))}


def from_here(rules, first):
    """Rules, and all that come of them."""
    found = set(first)
    for rule, (_, parents) in rules.items():
        if parents & found:
            found.add(rule)
    return [rule for rule in rules if rule in found]


def table(rules):
    """A row for each set of rules: the keys that re-run them."""
    rows = {}
    for path in leaves():
        if path in (("atlas",), ("results",)):  # another folder
            continue
        first = [rule for rule, (keys, _) in rules.items() if path in keys]
        rows.setdefault(tuple(from_here(rules, first)), []).append(path)
    lines = ["| keys | re-runs |", "|---|---|"]
    order = list(rules)
    for found, paths in sorted(rows.items(), key=lambda row: (-len(row[0]), [order.index(rule) for rule in row[0]])):
        sections = {}
        for *section, key in paths:
            sections.setdefault(".".join(section), []).append(key)
        told = []
        for section, keys in sections.items():
            whole = section and len(keys) == len(Config.model_fields[section].annotation.model_fields)
            told += [f"all of `{section}`"] if whole else [f"`{section + '.' if section else ''}{key}`" for key in keys]
        lines.append(f"| {', '.join(told)} | {', '.join(found)} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_what_each_key_reruns(tmp_path):
    folder = make(tmp_path / "project", WHOLE, SHEET)
    rules = jobs(folder)
    made = table(rules)
    before, _, rest = README.read_text("utf-8").partition(BEGIN)
    told, end, after = rest.partition(END)
    if os.environ.get("SCVI_CORE_WRITE_TABLES"):
        README.write_text(before + BEGIN + made + END + after, "utf-8")
    else:
        assert end and told == made, f"run again with SCVI_CORE_WRITE_TABLES=1, which writes it into {README}"
    # where the registry is, what is shown, and who trains next change no result
    for path in leaves():
        users = {rule for rule, (keys, _) in rules.items() if path in keys}
        if path[0] == "registry":
            assert users <= {"register", "report"} | ({"export"} if path[1] == "name" else set()), path
        if path[0] == "report":
            assert users == {"report"}, path
        assert users, f"{path}: no rule knows it"
