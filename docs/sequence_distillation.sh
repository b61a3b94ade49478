#!/bin/sh
# Sequence-level distillation: a teacher answers prompts, a verifier keeps the good answers, a student is
# fine-tuned on them. docs/sequence_distillation.md explains the steps.
#
#   TEACHER=DIR STUDENT=DIR PROMPTS=prompts.jsonl sh docs/sequence_distillation.sh [options of train.py]
#
# The same command goes on where it was killed. More variables: WORK (folder of all that is made), SAMPLES
# (answers to a prompt), MAX_TOKENS, VERIFIER (FILE.py:FUNCTION, or accuracy), BEST_OF (answers kept of a
# prompt), FILTER (more options of the filter), TEACHER_OPTIONS (of generate: --mesh=expert=8, ...), PYTHON.
set -eu
: "${TEACHER:?name the teacher: a Hugging Face folder, or the workdir of a run}"
: "${STUDENT:?name the student: a Hugging Face folder}"
: "${PROMPTS:?name a JSONL file of prompts}"
WORK=${WORK:-runs/sequence_distillation}
PYTHON=${PYTHON:-python}
mkdir -p "$WORK"

# 1 The teacher answers. Goes on after a kill; complete, it is not made again.
# shellcheck disable=SC2086  # several options in one variable
$PYTHON -m deepseek_jax.generate "$TEACHER" --prompts="$PROMPTS" --samples="${SAMPLES:-8}" \
  --temperature=0.8 --max-tokens="${MAX_TOKENS:-2048}" --out="$WORK/answers.jsonl" ${TEACHER_OPTIONS:-}

# 2 What is right stays: answers that ended, that the verifier accepts, each once.
# shellcheck disable=SC2086
$PYTHON -m deepseek_jax.data filter "$WORK/answers.jsonl" "$WORK/train.jsonl" \
  --verifier="${VERIFIER:-accuracy}" --best-of="${BEST_OF:-4}" --deduplicate ${FILTER:-}

# 3 The student learns them, as any chats.
$PYTHON train.py --config=configs/post/sft.py --config.init_from="$STUDENT" \
  --config.data.path="$WORK/train.jsonl" --workdir="$WORK/student" "$@"
