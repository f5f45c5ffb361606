#!/usr/bin/env bash
# Pre-train a GPT on the GPUs of one machine while COPUS chooses batch size, micro-batch and layout.
#
#   DATA=/data/text_document TOKENIZER=/data/tokenizer bash examples/one_node/pretrain.sh [more flags]
#
# Written for NVIDIA GPUs with Transformer Engine. Without it: TE=0 (then no sequence parallel, and attention whose
# memory grows with the square of SEQ). Flags behind the script's name win over the ones below. Started again with the
# same OUT, the run goes on from its newest checkpoint.
#
#   DATA        blend of prefixes made by tools/preprocess_data.py; required unless MOCK=1
#   TOKENIZER   folder of a Hugging Face tokenizer; required unless MOCK=1
#   MOCK        1: Megatron's counting data, to try the machine out; noise scale and batch size mean nothing then
#   GPUS        ranks to start (all that nvidia-smi lists)
#   MODEL       1b, 3b or 7b (1b)          SEQ  tokens in a sequence (4096)
#   TP, PP      first tensor and pipeline parallel sizes (2 and 1 for 7b, else 1 and 1)
#   MBS, GBS    first micro-batch and global batch size, in sequences (1, 128)
#   TOKENS      length of the run in tokens, in billions (20)
#   SPACE       what COPUS may choose from (tp and pp up to 4, micro-batches up to 4, batches from GBS/8 to GBS*16)
#   RECOMPUTE   none, selective or full (selective: with none, COPUS's memory model counts the scores of unfused
#               attention, which flash attention does not keep, and so leaves out plans that would fit)
#   OUT         folder for everything that the run writes (runs/one_node)
#   TE, APEX    1 where Transformer Engine, and NVIDIA's apex with its CUDA extensions, can be imported (1, 0)
#   VENV        virtual environment made by `make env` (.venv)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

MOCK=${MOCK:-0} MODEL=${MODEL:-1b} SEQ=${SEQ:-4096} MBS=${MBS:-1} GBS=${GBS:-128} TOKENS=${TOKENS:-20}
[[ $MODEL == 7b ]] && TP=${TP:-2}
TP=${TP:-1} PP=${PP:-1} RECOMPUTE=${RECOMPUTE:-selective}
TE=${TE:-1} APEX=${APEX:-0} VENV=${VENV:-.venv} OUT=${OUT:-runs/one_node}
SPACE=${SPACE:-tp=1,2,4 pp=1,2,4 mbs=1,2,4 gbs=$((GBS / 8))..$((GBS * 16))}
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}

case $MODEL in
  1b) model=(--num-layers 16 --hidden-size 2048 --ffn-hidden-size 8192 --num-attention-heads 32 --num-query-groups 8) ;;
  3b) model=(--num-layers 28 --hidden-size 3072 --ffn-hidden-size 8192 --num-attention-heads 24 --num-query-groups 8) ;;
  7b) model=(--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --num-query-groups 8
    --untie-embeddings-and-output-weights) ;;
  *) echo "MODEL=$MODEL: choose 1b, 3b or 7b" >&2 && exit 2 ;;
esac
model+=(--group-query-attention --seq-length "$SEQ" --max-position-embeddings "$SEQ" --position-embedding-type rope
  --rotary-base 500000 --swiglu --normalization RMSNorm --disable-bias-linear --attention-dropout 0 --hidden-dropout 0)

if [[ $MOCK == 1 ]]; then
  data=(--mock-data --tokenizer-type NullTokenizer --vocab-size 32000 --split 99,1,0)
else
  read -ra blend <<<"${DATA:?name the prefixes of your data, or try MOCK=1}"
  data=(--data-path "${blend[@]}" --split 99,1,0 --data-cache-path "$OUT/cache"
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "${TOKENIZER:?name the folder of a tokenizer}")
fi

samples=$((TOKENS * 1000000000 / SEQ))
training=(--train-samples "$samples" --micro-batch-size "$MBS" --global-batch-size "$GBS"
  --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP"
  --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-samples $((samples / 100))
  --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 --bf16 --seed 1234)

speed=(--overlap-grad-reduce --no-create-attention-mask-in-dataloader --num-workers 2)
if [[ $TE == 1 ]]; then # it picks FlashAttention or cuDNN's fused attention by itself
  speed+=(--transformer-impl transformer_engine --attention-backend auto --sequence-parallel)
else
  speed+=(--transformer-impl local --no-masked-softmax-fusion --no-rope-fusion --no-persist-layer-norm)
fi
[[ $APEX == 1 ]] || speed+=(--no-gradient-accumulation-fusion) # the output layer takes that kernel from NVIDIA's apex
# With neither of the two, megatron-core 0.19.2 writes checkpoints of a distributed optimizer that it cannot load.
[[ $TE == 0 && $APEX == 0 ]] || speed+=(--use-distributed-optimizer --overlap-param-gather)
case $RECOMPUTE in
  none) ;;
  selective) speed+=(--recompute-granularity selective) ;;
  full) speed+=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1) ;;
  *) echo "RECOMPUTE=$RECOMPUTE: choose none, selective or full" >&2 && exit 2 ;;
esac

outputs=(--copus-dir "$OUT" --copus-space "$SPACE" --copus-interval 50
  --save "$OUT/checkpoints" --load "$OUT/checkpoints" --save-interval 500 --ckpt-format torch_dist
  --tensorboard-dir "$OUT/tensorboard" --log-interval 10 --log-throughput
  --eval-interval 500 --eval-iters 10 --exit-signal-handler --distributed-timeout-minutes 30)

mkdir -p "$OUT"
export CUDA_DEVICE_MAX_CONNECTIONS=1      # Megatron insists on it for tensor parallelism before Blackwell
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 # seconds for a checkpoint after a SIGTERM; older torch: always 30
# As a module, so that it is this environment's Python even where torch itself is the machine's.
exec "$VENV/bin/python" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" pretrain_gpt_copus.py \
  "${model[@]}" "${data[@]}" "${training[@]}" "${speed[@]}" "${outputs[@]}" "$@"
