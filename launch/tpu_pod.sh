#!/usr/bin/env bash
# A Cloud TPU pod slice: the same command on every host; JAX finds the other hosts through the TPU's metadata.
#   TPU=my-slice ZONE=us-east5-a launch/tpu_pod.sh gs-or-shared/config.yaml --mesh.fsdp 32
# The package, the configuration and the output folder must be reachable under the same path on every host.
set -euo pipefail
config=${1:?usage: TPU=NAME ZONE=ZONE launch/tpu_pod.sh CONFIG.yaml [FLAGS]}
: "${TPU:?name of the TPU slice}" "${ZONE:?zone of the TPU slice}"
command="SAFEMOE_MULTIHOST=auto safemoe train --config $(printf '%q ' "$config" "${@:2}")"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$command"
