#!/bin/sh
# For developers: makes pins/ anew from pyproject.toml. Needs `uv` on the path and the package index.
# torch, what comes only through torch, and Triton stay out of requirements.lock: they differ by graphics card. Those of
# the package index's own build of torch (Linux with a card, macOS) are in torch.lock, with hashes like all others.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
cd "$here/.."
pins=installer/pins
torch_only="torch triton-windows cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti
    nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver
    nvidia-cusparse nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx"
left_out=$(for name in $torch_only; do printf -- '--no-emit-package %s ' "$name"; done)

compile() {
    # shellcheck disable=SC2086  # left_out is a list of words
    uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header --no-annotate \
        --no-emit-index-url --constraint "$pins/torch.txt" $left_out "$@"
}

compile pyproject.toml --extra gguf --no-emit-package triton -o "$pins/requirements.lock"
compile pyproject.toml --extra gguf --extra test --constraint "$pins/requirements.lock" -o "$pins/tests.lock"
shared="filelock fsspec jinja2 markupsafe mpmath networkx setuptools sympy typing-extensions"
# shellcheck disable=SC2046  # a list of words
uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header --no-annotate \
    --no-emit-index-url --constraint "$pins/requirements.lock" \
    $(for name in $shared; do printf -- '--no-emit-package %s ' "$name"; done) "$pins/torch.txt" -o "$pins/torch.lock"
echo ziglang | uv pip compile --quiet --generate-hashes --universal --python-version 3.11 --no-header --no-annotate \
    --no-emit-index-url - -o "$pins/compiler.lock"
