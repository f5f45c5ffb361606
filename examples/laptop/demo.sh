#!/usr/bin/env bash
# The main job on one machine without an accelerator: a GPT on Python's own sources, four ranks over gloo.
# COPUS starts from the batch and layout below and moves the running job where its numbers say.
#   RANKS, SAMPLES, OUT: ranks (4), sequences to train on (4096), where outputs go (runs/demo).
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
OUT=${OUT:-runs/demo}
mkdir -p "$OUT"
(cd "$OUT" && rm -rf events.jsonl report.html train.log cache tensorboard checkpoints)  # of the last demo
echo "training; the whole of Megatron's log goes to $OUT/train.log"
python -m torch.distributed.run --nproc-per-node "${RANKS:-4}" pretrain_gpt_copus.py \
    --num-layers 4 --hidden-size 512 --num-attention-heads 8 --seq-length 64 --max-position-embeddings 64 \
    --position-embedding-type rope --swiglu --ffn-hidden-size 1408 --normalization RMSNorm --disable-bias-linear \
    --hidden-dropout 0 --attention-dropout 0 \
    --tokenizer-type ByteLevelTokenizer --data-cache-path "$OUT/cache" \
    --train-data-path runs/demo-data/train_text_document --valid-data-path runs/demo-data/valid_text_document \
    --train-samples "${SAMPLES:-4096}" --micro-batch-size 1 --global-batch-size 8 \
    --lr 6e-4 --min-lr 6e-5 --lr-decay-style cosine --lr-warmup-samples 128 --weight-decay 0.1 --clip-grad 1.0 \
    --eval-interval 100 --eval-iters 4 --eval-global-batch-size 16 --log-interval 10 \
    --copus-dir "$OUT" --copus-space "mbs=1,2,4 gbs=2..64" --copus-interval 20 "$@" \
    2>&1 | tee "$OUT/train.log" | grep --line-buffered -E '^ \[copus\]|Error|pretrain_gpt_copus.py:' || true
[ -s "$OUT/events.jsonl" ] || { echo "no run; $OUT/train.log says why" >&2; exit 2; }
python tools/report.py "$OUT"
tail -n 1 "$OUT/events.jsonl" | grep -q '"status": "finished"'
