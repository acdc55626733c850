#!/usr/bin/env bash
# Regenerates kvstore/v1 from proto/ with the pinned generator, in an environment of its own.
# Usage: ops/scripts/gen_proto.sh [OUTPUT_ROOT]   (default: the repository)
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-.}
env_dir=${KVTIER_PROTO_ENV:-.venv-proto}
if [ ! -x "$env_dir/bin/python" ]; then
  python3 -m venv "$env_dir"
fi
"$env_dir/bin/python" -c 'import grpc_tools' 2>/dev/null ||
  "$env_dir/bin/pip" install --quiet 'grpcio-tools==1.71.2' 'mypy-protobuf==3.6.0'
mkdir -p "$out"
PATH="$PWD/$env_dir/bin:$env_dir/bin:$PATH" "$env_dir/bin/python" -m grpc_tools.protoc -I proto \
  --python_out="$out" --mypy_out=quiet:"$out" --grpc_python_out="$out" --mypy_grpc_out=quiet:"$out" \
  proto/kvstore/v1/*.proto
# Services live in two files only; the other stubs hold nothing.
rm -f "$out"/kvstore/v1/{types,agent}_pb2_grpc.py*
