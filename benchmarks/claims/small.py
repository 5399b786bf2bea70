"""The small teacher: a Llama of 3.1 M parameters, trained here from random weights by cross-entropy.

Its BPE of 4096 entries is trained on the quickstart's training text. What a run directory of the quickstart has comes
out: `teacher` and `data`; and `initial`, the untrained weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.bench import RECIPE
from minitron_nemo.checkpoint.files import replacing_directory, write_atomic
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.config import Recipe, load_recipe
from minitron_nemo.data.documents import read_documents
from minitron_nemo.data.prepare import prepare_data
from minitron_nemo.distillation.records import read_metrics
from minitron_nemo.distillation.train import train
from minitron_nemo.evaluation.heldout import HeldOut
from minitron_nemo.parallel.layout import Layout

SEPARATOR = "<|endoftext|>"
VOCABULARY = 4096
# Updates of 2048 tokens.
TRAINING = (
    "data.sequence_length=128",
    "train.global_batch_size=16",
    "train.micro_batch_size=16",
    "train.warmup_steps=10",
    "train.precision=fp32",
    "train.log_interval=10",
    "train.save_interval=100",
    "parallel.pipeline_model_parallel_size=1",
    "evaluate.documents=128",
    "evaluate.micro_batch_size=4",
)
FROM_SCRATCH = ("train.lr=3e-3", "train.min_lr=3e-4")
CROSS_ENTROPY = ("distill.logits_weight=0", "distill.ce_weight=1")
CURVE = "curve.json"


def make_teacher(base: Path, steps: int) -> None:
    """Write `base`, of which what is there is not made again."""
    recipe = load_recipe(RECIPE, (*TRAINING, *FROM_SCRATCH, *CROSS_ENTROPY, f"train.steps={steps}"))
    if not (base / "initial").exists():
        write_random(base / "random", write_tokenizer(recipe))
        convert(base / "random", base / "initial", "megatron", progress=False)
    prepare_data(recipe.data, base / "initial" / "tokenizer", base / "data", progress=False)
    if not (base / CURVE).exists():
        learn(recipe, base / "initial", base / "data", base / "teacher", base / CURVE, base / "training")


def learn(recipe: Recipe, start: Path, data: Path, output: Path, curve: Path, training: Path) -> None:
    """Train by the recipe without a teacher, keeping the held-out loss every 50 updates as [[tokens, loss], ...]."""
    recipe.train.eval_interval = 50
    outcome = train(
        recipe,
        student_dir=start,
        teacher_dir=start,  # cross-entropy alone asks it nothing
        prepared=data,
        work_dir=training / "checkpoints",
        output_dir=output,
        run_dir=training,
        heldout=lambda: HeldOut.from_recipe(recipe, data, Layout()),
    )
    if outcome == "stopped":
        raise SystemExit(f"{output}: stopped; start again and it goes on")
    batch = recipe.train.global_batch_size * recipe.data.sequence_length
    records = [record for record in read_metrics(training / "checkpoints" / "metrics.jsonl") if "validation/loss" in record]
    points = [[record["iteration"] * batch, record["validation/loss"]] for record in records]
    write_atomic(curve, json.dumps(points))
    shutil.rmtree(training)


def write_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the training sources' documents; those that are held out by their hash are among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(SEPARATOR, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(recipe), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SEPARATOR)


def texts(recipe: Recipe) -> Iterator[str]:
    for source in recipe.data.train:
        yield from (document.text for document in read_documents(source)[1])


def write_random(directory: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A Hugging Face directory of random weights, as transformers initialises them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with replacing_directory(directory) as partial:
        LlamaForCausalLM(config).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
