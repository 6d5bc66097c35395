#!/usr/bin/env bash
# One host, all its devices: launch/single_host.sh experiments/olmoe_samsum_safemoe.yaml [--mesh.fsdp 8 ...]
set -euo pipefail
config=${1:?usage: launch/single_host.sh CONFIG.yaml [FLAGS]}
exec safemoe train --config "$config" "${@:2}"
