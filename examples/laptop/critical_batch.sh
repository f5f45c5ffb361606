#!/usr/bin/env bash
# The critical batch of the demo's model, measured by branches at two points of one run: some ten minutes on two cores.
# The learning rate stays where its warm-up ends, so that no branch gains by a schedule (docs/critical-batch.md).
#   OUT: where outputs go (runs/critical-batch).
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
OUT=${OUT:-runs/critical-batch}
[ -e runs/demo-data/train_text_document.bin ] || python tools/make_demo_data.py --out runs/demo-data
mkdir -p "$OUT"
(cd "$OUT" && rm -rf run branches critical_batch.json critical_batch.svg train.log)  # of the last measurement
echo "training; the whole of Megatron's log goes to $OUT/train.log"
python -m torch.distributed.run --nproc-per-node 2 tools/measure_critical_batch.py \
    --num-layers 4 --hidden-size 512 --num-attention-heads 8 --seq-length 64 --max-position-embeddings 64 \
    --position-embedding-type rope --swiglu --ffn-hidden-size 1408 --normalization RMSNorm --disable-bias-linear \
    --hidden-dropout 0 --attention-dropout 0 \
    --tokenizer-type ByteLevelTokenizer --data-cache-path "$OUT/cache" \
    --train-data-path runs/demo-data/train_text_document --valid-data-path runs/demo-data/valid_text_document \
    --train-samples 4096 --micro-batch-size 2 --global-batch-size 8 \
    --lr 6e-4 --min-lr 6e-4 --lr-decay-style constant --lr-warmup-samples 128 --weight-decay 0.1 --clip-grad 1.0 \
    --eval-iters 16 --eval-global-batch-size 8 --log-interval 10 \
    --branch-at 512,1536 --branch-multiples 1/2,1,2,4,8 --branch-samples 768 --branch-evals 6 \
    --copus-dir "$OUT" --copus-policy static --copus-interval 40 "$@" \
    2>&1 | tee "$OUT/train.log" | grep --line-buffered -E '^ \[(copus|branch)\]|Error|measure_critical_batch.py:' || true
sed -n '/^Branches at/,$p' "$OUT/train.log"
test -e "$OUT/critical_batch.svg"
