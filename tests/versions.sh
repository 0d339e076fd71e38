#!/usr/bin/env bash
# Installs the package on each supported Python that is there, imports it and trains one step; then runs the
# tests on the lowest supported Keras 3. Needs uv. Environments go to a temporary folder.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# The interpreter of a version: on the path, or one that pyenv keeps off it, or what uv finds or fetches.
interpreter() {
  local candidate
  for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
    if "$candidate" -c '' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "$1"
}

smoke='
import keras, numpy, tensorflow, trainstep
model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(1)])
trainstep.apply(model, ["gradient_accumulation", "gradient_clipping", "mixed_precision", "adversarial"])
model.compile("adam", "mse")
model.fit(numpy.ones((8, 3), "float32"), numpy.ones((8, 1), "float32"), batch_size=2, verbose=0)
print("TensorFlow", tensorflow.__version__, "Keras", keras.__version__, *trainstep.names())
'
for version in 3.10 3.11 3.12 3.13; do
  echo "--- Python $version"
  uv venv --quiet --python "$(interpreter "$version")" "$folder/$version"
  uv pip install --quiet --compile-bytecode --python "$folder/$version/bin/python" .
  (cd "$folder" && "$folder/$version/bin/python" -c "$smoke")
done

echo "--- lowest Keras 3"
uv venv --quiet --python "$(interpreter 3.11)" "$folder/lowest"
uv pip install --quiet --compile-bytecode --python "$folder/lowest/bin/python" \
  --editable . --group dev 'tensorflow==2.16.2' 'keras==3.11.0'
"$folder/lowest/bin/python" -m pytest -n 2
