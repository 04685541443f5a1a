#!/usr/bin/env bash
# Of what pip says, the lines that tell of progress: large downloads, and the end.
grep --line-buffered -E '^ *(Downloading .*[0-9] [MG]B|Installing collected|Successfully)' | cut -c1-100 || true
