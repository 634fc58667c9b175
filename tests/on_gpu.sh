#!/bin/sh
# All tests of the card, one part after the other, and a line for each part at the end; exits with 1 if any of them
# failed. Needs no network and no virtual environment: PYTHON (default python3) must have PyTorch, Triton, NumPy,
# msgspec, safetensors, pytest and hypothesis. PARTS (default "tests kernels sanitizer") names the parts to run.
cd "$(dirname "$0")/.." || exit 2
PYTHON="${PYTHON:-python3}"
TESTS="${GPU_TESTS:-tests/test_dormant.py tests/test_isolation.py tests/test_on_gpu.py tests/test_restore_on_gpu.py tests/test_compiled.py tests/test_compiled_modes.py}"
export PYTHONPATH="src:.${PYTHONPATH:+:$PYTHONPATH}" CUBLAS_WORKSPACE_CONFIG=:4096:8
status=0
summary=""

# part NAME TITLE COMMAND...: runs it, notes how it ended and how long it took
part() {
    name=$1 title=$2
    shift 2
    case " ${PARTS:-tests kernels sanitizer} " in *" $name "*) ;; *) return 0 ;; esac
    echo "== $title"
    begun=$(date +%s)
    if "$@"; then end=passed; else end=FAILED status=1; fi
    line=$(printf '%-9s %s in %s s' "$name" "$end" "$(($(date +%s) - begun))")
    echo "== $line"
    summary="$summary
$line"
}

# settings of their own: those of pyproject.toml name plug-ins that may not be there
run_tests() {
    # shellcheck disable=SC2086  # several files
    ESPER_TEST_DEVICE=cuda "$PYTHON" -m pytest -c tests/on_gpu.ini --rootdir . -q $TESTS "$@"
}

sanitize() {
    if command -v compute-sanitizer > /dev/null; then
        "$PYTHON" benchmarks/ops/sanitize.py ${OUT:+--out "$OUT/ops_sanitizer.json"}
    else
        echo "compute-sanitizer was not found: left out (it comes with the CUDA toolkit)"
    fi
}

part tests "no waiting, CUDA graphs, identity, isolation, undo and resume on the card" run_tests "$@"
part kernels "every kernel against its reference, in fp32, fp16 and bf16" \
    "$PYTHON" -m pytest -c tests/on_gpu.ini --rootdir . -q tests/kasmina/ops/interpreted.py
part sanitizer "every kernel under compute-sanitizer: memcheck and racecheck" sanitize
echo "== summary$summary"
exit $status
