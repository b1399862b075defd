#!/bin/sh
# Builds sdist and wheel (the wheel from the sdist), installs it in an empty environment and runs its smoke test there.
#   sh tests/wheel.sh                          newest versions of the dependencies
#   sh tests/wheel.sh lowest-direct            the lower bounds of pyproject.toml
#   sh tests/wheel.sh highest 3.13             another Python
#   sh tests/wheel.sh lowest-direct 3.11 tests/evaluation/test_stats.py tests/models/test_loading.py      these tests too
# Needs uv. Works in a folder of its own, outside the checkout, so that nothing but the wheel is imported.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
resolution=${1:-highest}
python=${2:-3.11}
[ $# -lt 2 ] && set -- || shift 2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
uv build -q -o "$work/dist" "$root"
uv venv -q -p "$python" "$work/venv"
uv pip compile -q --resolution "$resolution" --extra cpu -p "$work/venv/bin/python" -o "$work/pins.txt" "$root/pyproject.toml"
uv pip install -q -p "$work/venv/bin/python" -r "$work/pins.txt" "$work"/dist/*.whl
cp -r "$root/tests" "$root/README.md" "$root/pyproject.toml" "$root/data" "$work"
cd "$work"
venv/bin/python -m mlx_traces configs
venv/bin/mlx-traces study study_countdown_nano --dry-run
venv/bin/mlx-traces doctor
venv/bin/mlx-traces compare --prompt direct --prompt thinking --limit 20 --runs-dir runs
venv/bin/mlx-traces verify runs/*
if [ $# -gt 0 ]; then
  cp -r "$root/configs" .
  uv pip install -q -p venv/bin/python pytest hypothesis scipy setuptools
  venv/bin/pytest -c /dev/null --rootdir . -q -p no:cacheprovider -W ignore "$@"
fi
echo "passed: $(venv/bin/python --version), $(grep -E '^(mlx|mlx-lm|transformers|numpy)==' pins.txt | tr '\n' ' ')"
