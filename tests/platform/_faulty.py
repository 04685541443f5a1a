"""Runs commands of scvi-core, each in a child of its own, with a fault at one of its system calls; under fault.so.

Reads one JSON object a line: argv, cwd, and call, under, nth, errno of the fault; nth 0 only counts. Answers likewise.
"""

import ctypes
import json
import os
import sys
import tempfile

import scvi_core.api
import scvi_core.cli
import scvi_core.cluster
import scvi_core.criticism
import scvi_core.de
import scvi_core.io
import scvi_core.preprocess.genes
import scvi_core.preprocess.qc
import scvi_core.preprocess.store
import scvi_core.registry
import scvi_core.report
import scvi_core.steps

fault = ctypes.CDLL(None)
fault.fault_seen.restype = ctypes.c_long
for line in sys.stdin:
    asked = json.loads(line)
    with tempfile.TemporaryFile() as told:
        child = os.fork()
        if not child:
            os.chdir(asked["cwd"])
            os.dup2(told.fileno(), 2)
            os.dup2(told.fileno(), 1)
            sys.argv = ["scvi-core", *asked["argv"]]
            of = asked["call"].encode(), asked["under"].encode()
            fault.fault_set(*of, ctypes.c_long(asked["nth"]), ctypes.c_int(asked["errno"]))
            code = 0
            try:
                scvi_core.cli.main()
            except SystemExit as end:
                code = end.code or 0
            seen = fault.fault_seen()
            fault.fault_set(b"", b"", ctypes.c_long(0), ctypes.c_int(0))
            sys.stderr.flush()
            os.write(2, f"\nseen {seen}\n".encode())
            os._exit(code if isinstance(code, int) else 1)
        _, status = os.waitpid(child, 0)
        told.seek(0)
        said, _, seen = told.read().decode("utf-8", "replace").rpartition("\nseen ")
        answer = {
            "rc": os.waitstatus_to_exitcode(status),
            "said": said,
            "seen": int(seen) if seen.strip().isdigit() else -1,
        }
    print(json.dumps(answer), flush=True)
