"""A software bill of materials, CycloneDX 1.5: every Python and Debian package of this machine or image.

    sbom.py                  print that of the image or machine it runs on
    sbom.py OLD.json NEW.json   print what differs; exit with 1 if anything does

No date and no serial number: the same packages give the same bytes.
"""

import json
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import distributions, version
from pathlib import Path


def packages() -> list[dict[str, str]]:
    """One component a package, sorted by kind and name."""
    purls = {f"pkg:pypi/{d.name.lower().replace('_', '-')}@{d.version}": (d.name, d.version) for d in distributions()}
    purls[f"pkg:generic/python@{platform.python_version()}"] = ("python", platform.python_version())
    if shutil.which("dpkg-query"):
        query = ["dpkg-query", "--show", "--showformat", "${Package} ${Version} ${Architecture}\n"]
        for line in subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines():
            name, number, machine = line.split()
            purls[f"pkg:deb/debian/{name}@{number}?arch={machine}"] = (name, number)
    return [
        {"type": "library", "bom-ref": purl, "name": name, "version": number, "purl": purl}
        for purl, (name, number) in sorted(purls.items())
    ]


def bill() -> dict[str, object]:
    """The document."""
    about = {"type": "container", "name": "scvi-core", "version": version("scvi-core")}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": about},
        "components": packages(),
    }


def compare(old: Path, new: Path) -> list[str]:
    """Lines that say which packages went, came or changed."""
    before, after = (
        {re.sub("@[^?]*", "", c["purl"]): c["version"] for c in json.loads(path.read_text())["components"]}
        for path in (old, new)
    )
    return [
        f"{name}: {before.get(name, 'absent')} -> {after.get(name, 'absent')}"
        for name in sorted(before | after)
        if before.get(name) != after.get(name)
    ]


if __name__ == "__main__":
    if len(sys.argv) == 3:
        found = compare(Path(sys.argv[1]), Path(sys.argv[2]))
        print("\n".join(found) or "the same packages")
        sys.exit(bool(found))
    print(json.dumps(bill(), indent=1))
