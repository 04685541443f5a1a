"""Files: whole or absent, our own, with a checksum; and the record of decisions.

Everything that scvi-core writes goes through :func:`replacing`: a temporary name in the same folder, fsync, rename. A
reader never meets half a file, and a failed run leaves earlier results as they were.

``errors → owned → locks → whole → checksum → formats → decisions``: a module imports only modules to its left.
"""

from scvi_core.files.checksum import (
    BLANK,
    SMALL,
    code_sha256,
    damaged,
    seal,
    sha256_file,
    sha256_text,
    stamp,
    verify,
)
from scvi_core.files.decisions import Decision, Decisions, decided, read_decisions
from scvi_core.files.errors import UserError
from scvi_core.files.formats import (
    canonical_json,
    parquet_writer,
    read_json,
    read_parquet,
    write_json,
    write_parquet,
)
from scvi_core.files.locks import Claim, alone
from scvi_core.files.owned import FILES, FOLDERS, LITTER, check_output
from scvi_core.files.whole import replacing, sweep
