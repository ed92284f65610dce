"""E.T. Chat as a model of lmms-eval: `lmms-eval --model etchat --model_args pretrained=MODEL`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm

from ....clip_encoder import ClipEncoder
from ....inference import load
from ....processing_etchat import EncodedClip
from ...answering import Prompt, answer_batch, write_prompt
from ...clips import reason_of, sample_video
from ...tasks import Request

MAX_NEW_TOKENS = 2048


@dataclass(frozen=True)
class Question:
    """One request of lmms-eval in our terms.

    Attributes:
        name: Its task and doc, for messages.
        path: The video or image it is about.
        request: What it asks.
        max_new_tokens: Longest answer.
        stops: Texts at the first of which the answer ends.
    """

    name: str
    path: str
    request: Request
    max_new_tokens: int
    stops: list[str]


class ETChat(lmms):
    """
    E.T. Chat. Answers are greedy, and so reproducible; each request is about one video or image file.

    Any task that gives such files as visuals can be run. A doc of a task may also hold `etchat`, fields of `Request`
    that lmms-eval has no place for, such as the seconds of each `<vid>` of the question.

    Args:
        pretrained: Folder or Hub id of a converted checkpoint.
        dtype: See `etchat_hf.inference.load`.
        device: As for `torch.device`; by default each process of `accelerate launch` takes its own.
        batch_size: The most requests answered at once.
        fps, max_frames: Replace the video processor's.
        cache: Folder that keeps encoded videos for later runs.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        fps: float | None = None,
        max_frames: int | None = None,
        cache: str | None = None,
    ):
        super().__init__()
        self.accelerator = Accelerator()
        self.device = torch.device(device) if device else self.accelerator.device
        self.model, self.processor = load(pretrained, dtype, str(self.device))
        self.encoder = ClipEncoder(self.model, self.processor, cache)
        self.batch_size, self.fps, self.max_frames = int(batch_size), fps, max_frames

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """
        Answers requests, sorted by video so that each passes the vision encoder once.

        As in `etchat infer`, one that cannot be answered, such as about a video that cannot be read, gets an empty
        answer, and a warning says why.

        Raises:
            ValueError: If a task asks what the model cannot do, such as to sample.
        """
        read = (self._read(request) for request in requests)
        questions = {index: question for index, question in enumerate(read) if question}
        order = sorted(questions, key=lambda index: questions[index].path)
        answers = [""] * len(requests)
        clips: dict[str, EncodedClip | str] = {}
        for start in tqdm(range(0, len(order), self.batch_size), desc="E.T. Chat", disable=self.rank != 0):
            batch = order[start : start + self.batch_size]
            paths = dict.fromkeys(questions[index].path for index in batch)
            # Of the batch before only clips that this one shares are kept: memory stays bounded.
            clips = {path: clips[path] if path in clips else self._try_to_encode(path) for path in paths}
            for index, answer in zip(batch, self._answer([questions[i] for i in batch], clips), strict=True):
                answers[index] = answer
        return answers

    def _read(self, request: Instance) -> Question | None:
        context, generation_kwargs, doc_to_visual, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        name = f"{task} doc {doc_id}"
        try:
            visuals = doc_to_visual(doc) or []
        except (OSError, ValueError) as error:
            _warn(name, reason_of(error))
            return None
        if len(visuals) != 1 or not isinstance(visuals[0], str):
            kinds = [type(visual).__name__ for visual in visuals]
            raise ValueError(f"{name} shows {kinds}; E.T. Chat takes the path of one video or image")
        _check_greedy(generation_kwargs, task)
        fields = dict(doc.get("etchat") or {})
        if "repetition_penalty" in generation_kwargs:
            fields["repetition_penalty"] = generation_kwargs["repetition_penalty"]
        until = generation_kwargs.get("until") or []
        return Question(
            name=name,
            path=visuals[0],
            request=Request(videos=(visuals[0],), question=context, **fields),
            max_new_tokens=generation_kwargs.get("max_new_tokens", MAX_NEW_TOKENS),
            stops=[until] if isinstance(until, str) else list(until),
        )

    def _encode(self, path: str) -> EncodedClip:
        video_processor = self.processor.video_processor
        return self.encoder.encode(sample_video(video_processor, Path(path), None, self.fps, self.max_frames))

    def _try_to_encode(self, path: str) -> EncodedClip | str:
        try:
            return self._encode(path)
        except (OSError, ValueError) as error:
            return reason_of(error)

    def _answer(self, questions: Sequence[Question], clips: dict[str, EncodedClip | str]) -> list[str]:
        prompts = [self._write_prompt(question, clips[question.path]) for question in questions]
        answerable = [index for index, prompt in enumerate(prompts) if prompt]
        texts = [""] * len(questions)
        if not answerable:
            return texts
        paths = list(dict.fromkeys(questions[index].path for index in answerable))
        answers = answer_batch(
            self.model,
            self.processor,
            [prompts[index] for index in answerable],
            [paths.index(questions[index].path) for index in answerable],
            [clips[path].frame_times for path in paths],
            torch.cat([clips[path].vision_features for path in paths]),
        )
        for index, answer in zip(answerable, answers, strict=True):
            texts[index] = _cut(answer.text, questions[index].stops)
        return texts

    def _write_prompt(self, question: Question, clip: EncodedClip | str) -> Prompt | None:
        if isinstance(clip, str):
            _warn(question.name, clip)
            return None
        try:
            return write_prompt(self.processor, self.model.config, question.request, clip, question.max_new_tokens)
        except ValueError as error:
            _warn(question.name, reason_of(error))
            return None

    def loglikelihood(self, requests: list[Instance]):
        """Not there: E.T. Chat's benchmarks are all answered in text."""
        raise NotImplementedError("etchat answers in text (generate_until); it gives no loglikelihood")

    def generate_until_multi_round(self, requests: list[Instance]):
        """Not there: E.T. Chat's benchmarks ask one question at a time."""
        raise NotImplementedError("etchat answers one question at a time (generate_until)")


def _warn(name: str, reason: str) -> None:
    logger.warning(f"{name} gets an empty answer: {reason}")


def _check_greedy(generation_kwargs: dict, task: str) -> None:
    sampled = generation_kwargs.get("do_sample")
    if sampled is None:
        sampled = (generation_kwargs.get("temperature") or 0) > 0
    if sampled or (generation_kwargs.get("num_beams") or 1) > 1:
        raise ValueError(f"{task} asks for {generation_kwargs}; etchat answers greedily: do_sample=False, num_beams=1")


def _cut(text: str, stops: Sequence[str]) -> str:
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text
