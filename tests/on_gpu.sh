#!/bin/sh
# All tests of the card, one after the other; exits with 1 if any of them failed. Needs no network and no virtual
# environment: PYTHON (default python3) must have PyTorch, Triton, NumPy, msgspec, safetensors, pytest and hypothesis.
cd "$(dirname "$0")/.." || exit 2
PYTHON="${PYTHON:-python3}"
TESTS="${GPU_TESTS:-tests/test_dormant.py tests/test_isolation.py tests/test_on_gpu.py}"
export PYTHONPATH="src:.${PYTHONPATH:+:$PYTHONPATH}" CUBLAS_WORKSPACE_CONFIG=:4096:8
status=0

# settings of their own: those of pyproject.toml name plug-ins that may not be there
echo "== no waiting, CUDA graphs, identity and isolation on the card"
# shellcheck disable=SC2086  # several files
ESPER_TEST_DEVICE=cuda "$PYTHON" -m pytest -c tests/on_gpu.ini --rootdir . -q $TESTS "$@" || status=1

echo "== every kernel against its reference, in fp32, fp16 and bf16"
"$PYTHON" -m pytest -c tests/on_gpu.ini --rootdir . -q tests/kasmina/ops/interpreted.py || status=1

echo "== every kernel under compute-sanitizer: memcheck and racecheck"
if command -v compute-sanitizer > /dev/null; then
    "$PYTHON" benchmarks/ops/sanitize.py ${OUT:+--out "$OUT/ops_sanitizer.json"} || status=1
else
    echo "compute-sanitizer was not found: left out (it comes with the CUDA toolkit)"
fi
exit $status
