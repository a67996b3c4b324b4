"""What other packages do with our models: pipelines, Trainer, sentence-transformers, gathering of outputs."""

import numpy as np
import pytest
import torch
import transformers as tf
from torch.nn import functional as F

from moebert_kernels.layers import set_task
from tests.distill.words import tokenizer_of
from tests.layers import kinds

WORDS = ["the", "a", "film", "was", "dull", "long", "rain", "small", "dog", "runs", "fast", "today"]
TEXTS = ["a small dog runs", "the film was long the film was dull today", "rain", "the dog was fast"]


@pytest.mark.parametrize("kind", kinds.CLASSIFIERS)
@pytest.mark.parametrize("task", ["text-classification", "feature-extraction"])
def test_pipelines_batched_or_not(kind, task):
    tokenizer = tokenizer_of(WORDS)
    net = kinds.model(kind, len(tokenizer))
    if kind == "split-bert-task":
        set_task(net, "b")
    if task == "feature-extraction":
        net = net.base_model
    run = tf.pipeline(task, model=net, tokenizer=tokenizer, device="cpu")
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = net(**inputs)
    for batch_size in (1, 2, 3):
        got = run(TEXTS, batch_size=batch_size)
        if task == "text-classification":
            wanted = output.logits.softmax(-1).max(-1)
            assert [entry["label"] for entry in got] == [f"LABEL_{label}" for label in wanted.indices.tolist()]
            torch.testing.assert_close(torch.tensor([entry["score"] for entry in got]), wanted.values)
        else:
            for states, mask, expected in zip(got, inputs["attention_mask"], output.last_hidden_state, strict=True):
                n = int(mask.sum())
                torch.testing.assert_close(torch.tensor(states)[0, :n], expected[:n])


class Rows(torch.utils.data.Dataset):
    """Ten rows of a kind's batches; the last batch of evaluation is a short one."""

    def __init__(self, kind):
        batches = [kinds.batch(kind, 2 * seed, labels=True) for seed in range(4)]
        self.rows = [{name: tensor[i] for name, tensor in batch.items()} for batch in batches for i in range(3)][:10]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def trainer(kind, net, folder, seen):
    def metrics(prediction):
        seen.append(prediction.predictions)
        logits = (
            prediction.predictions[0] if "t5" in kind else prediction.predictions
        )  # T5 has its encoder's states too
        return {"accuracy": float((np.argmax(logits, -1) == prediction.label_ids).mean())}

    arguments = tf.TrainingArguments(
        folder, per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=2, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    return tf.Trainer(net, arguments, train_dataset=Rows(kind), eval_dataset=Rows(kind), compute_metrics=metrics)


@pytest.mark.parametrize("kind", [kind for kind in kinds.KINDS if "t5" not in kind])
def test_trainer_trains_evaluates_and_predicts(kind, tmp_path):
    net, seen = kinds.model(kind), []
    run = trainer(kind, net, str(tmp_path), seen)
    run.train()
    assert np.isfinite(run.evaluate()["eval_loss"])
    predicted = run.predict(Rows(kind)).predictions
    rows = Rows(kind).rows
    with torch.no_grad():
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        wanted = net.eval()(**batch).logits
    for predictions in (*seen, predicted):
        assert isinstance(predictions, np.ndarray) and predictions.shape == wanted.shape
        torch.testing.assert_close(torch.from_numpy(predictions), wanted, rtol=1e-4, atol=1e-5)


def test_trainer_predicts_with_t5(tmp_path):
    kind, seen = "mpoe-t5-switch", []
    run = trainer(kind, kinds.model(kind), str(tmp_path), seen)
    run.train()
    predictions = run.predict(Rows(kind)).predictions
    names = [name for name in run.model(**kinds.batch(kind)) if name not in ("loss", "past_key_values", "cache")]
    assert names == ["logits", "encoder_last_hidden_state"] and len(predictions) == 2  # as of a dense T5
    assert predictions[0].shape == (10, 4, kinds.V) and predictions[1].shape[0] == 10


def mean_pooled(encoder, features):
    """As sentence-transformers asks for it: `forward` itself, and a tuple or an output with the states first."""
    states = encoder.forward(**features, return_dict=True)[0]
    mask = features["attention_mask"].unsqueeze(-1).to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1)


ENCODERS = [kind for kind in kinds.CLASSIFIERS if kind != "split-bert-task"]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # no other name in 5.17
@pytest.mark.parametrize("kind", ENCODERS)
def test_sentence_embeddings(kind):
    """One forward per column of texts, then one backward: in-batch negatives; encoding in batches of other sizes."""
    tokenizer = tokenizer_of(WORDS)
    encoder = kinds.model(kind, len(tokenizer)).base_model
    features = [tokenizer(TEXTS[i::2], padding=True, return_tensors="pt") for i in range(2)]
    with torch.no_grad():
        alone = [mean_pooled(encoder, tokenizer([text], return_tensors="pt"))[0] for text in TEXTS]
        for i, column in enumerate(features):
            torch.testing.assert_close(mean_pooled(encoder, column), torch.stack(alone[i::2]))
    gradients = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            encoder.gradient_checkpointing_enable({"use_reentrant": reentrant})
        encoder.train().zero_grad()
        torch.manual_seed(3)
        a, b = (mean_pooled(encoder, column) for column in features)
        F.cross_entropy(10 * F.normalize(a) @ F.normalize(b).T, torch.arange(2)).backward()
        gradients.append({name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None})
    for again in gradients[1:]:
        assert again.keys() == gradients[0].keys()
        for name, wanted in gradients[0].items():
            torch.testing.assert_close(again[name], wanted, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ENCODERS)
def test_sentence_transformers(kind, tmp_path):
    reason = "needs the package sentence-transformers, which the tests do not install"
    package = pytest.importorskip("sentence_transformers", reason=reason)
    tokenizer = tokenizer_of(WORDS)
    encoder = kinds.model(kind, len(tokenizer)).base_model
    encoder.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    from sentence_transformers import models

    words = models.Transformer(str(tmp_path), max_seq_length=16)
    sentences = package.SentenceTransformer(modules=[words, models.Pooling(16)], device="cpu")
    for batch_size in (1, 2):
        got = torch.from_numpy(sentences.encode(TEXTS, batch_size=batch_size))
        with torch.no_grad():
            wanted = [mean_pooled(words.auto_model, tokenizer([text], return_tensors="pt"))[0] for text in TEXTS]
        torch.testing.assert_close(got, torch.stack(wanted))
