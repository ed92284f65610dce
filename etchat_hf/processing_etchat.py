"""Messages and clips in, tensors out; generated tokens in, text with seconds out.

`ETChatProcessor` joins the video processor, the language model's tokenizer and the Q-Former's tokenizer. This file
travels with every saved model, so it imports only its neighbours and public packages.
"""

import os
import re
from dataclasses import dataclass

import torch
from transformers import AddedToken, BatchFeature, ProcessorMixin
from transformers.utils import ModelOutput
from transformers.utils.chat_template_utils import render_jinja_template

from .generation_etchat import ETChatGenerateOutput
from .video_processing_etchat import ETChatVideoProcessor, SampledClip

VID_TOKEN = "<vid>"
IMAGE_TOKEN = "<image>"
CLIP_TYPES = ("video", "image")
# Frames whose pixels are in memory while a clip is encoded.
ENCODED_AT_ONCE = 64
CLIP_KEYS = ("video", "image", "path", "url")
VIDEO_KWARGS = ("fps", "num_frames", "max_frames", "do_sample_frames", "video_metadata")
TOKENIZER_KWARGS = (
    "padding",
    "padding_side",
    "max_length",
    "truncation",
    "pad_to_multiple_of",
    "add_special_tokens",
    "return_offsets_mapping",
)
GROUPED_KWARGS = ("videos_kwargs", "text_kwargs", "common_kwargs")
CALL_KWARGS = (*VIDEO_KWARGS, *TOKENIZER_KWARGS, *GROUPED_KWARGS, "return_metadata")
SPAN = re.compile(r"<vid>\s*(?:-|–|—|to|until|till)\s*<vid>|between\s+<vid>\s+and\s+<vid>", re.IGNORECASE)


@dataclass(eq=False)
class EncodedClip:
    """
    A clip whose frames have passed the vision encoder. Stands wherever a clip can, for any number of questions.

    Args:
        vision_features (`torch.FloatTensor` of shape `(T, patches, C)`): what `get_vision_features` returned.
        frame_times (`list` of `float`): seconds of each frame since the first.
        frame_indices (`list` of `int`): numbers of the frames in the source.
        metadata (`dict`): the video processor's entry about the source.
    """

    vision_features: torch.FloatTensor
    frame_times: list[float]
    frame_indices: list[int]
    metadata: dict

    @property
    def duration(self) -> float:
        """Seconds of the source; 0 for an image."""
        return self.metadata["duration"]

    @classmethod
    def of(cls, clip: SampledClip, vision_features: torch.FloatTensor) -> "EncodedClip":
        """What became of a sampled clip."""
        return cls(vision_features, clip.frame_times, clip.frame_indices.tolist(), clip.metadata)

    def window(self, start: float, end: float) -> "EncodedClip":
        """The frames from `start` up to `end` (seconds), as a clip of its own that begins at 0."""
        kept = [index for index, time in enumerate(self.frame_times) if start <= time < end]
        times = [self.frame_times[index] for index in kept]
        return EncodedClip(
            vision_features=self.vision_features[kept],
            frame_times=[time - times[0] for time in times],
            frame_indices=[self.frame_indices[index] for index in kept],
            metadata=self.metadata | {"duration": min(end, self.metadata["duration"]) - start},
        )


class ETChatProcessor(ProcessorMixin):
    """
    Prepares questions about clips for [`ETChatForConditionalGeneration`] and reads its answers.

    Args:
        video_processor ([`ETChatVideoProcessor`]): samples and normalises frames.
        tokenizer (`PreTrainedTokenizerFast`): the language model's. `<vid>` and the placeholder `<image>` are added,
            in this order, where they are missing.
        qformer_tokenizer (`PreTrainedTokenizerFast`): the Q-Former's: BERT's with an added `[DEC]`.
        chat_template (`str`, *optional*): Jinja source.
        use_time_tag (`bool`, *optional*, defaults to `False`): whether each frame's Q-Former text begins with its
            time; the model's configuration says.
    """

    _auto_class = "AutoProcessor"

    def __init__(self, video_processor, tokenizer, qformer_tokenizer, chat_template=None, use_time_tag=False):
        super().__init__(video_processor, tokenizer, qformer_tokenizer, chat_template=chat_template)
        self.use_time_tag = use_time_tag
        missing = [token for token in (VID_TOKEN, IMAGE_TOKEN) if token not in tokenizer.get_vocab()]
        if missing:
            tokens = [AddedToken(token, special=True, normalized=False) for token in missing]
            tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)

    @property
    def match_token_id(self) -> int:
        """Id of `<vid>`."""
        return self.tokenizer.convert_tokens_to_ids(VID_TOKEN)

    @property
    def image_token_id(self) -> int:
        """Id of the placeholder `<image>`."""
        return self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def check_argument_for_proper_class(self, argument_name, argument):
        # transformers would look the class up through AutoVideoProcessor, which demands torchvision
        if argument_name != "video_processor":
            return super().check_argument_for_proper_class(argument_name, argument)
        return type(argument)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        tokenizers = [
            cls._load_tokenizer_from_pretrained(name, pretrained_model_name_or_path, **kwargs)
            for name in ("tokenizer", "qformer_tokenizer")
        ]
        return [ETChatVideoProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs), *tokenizers]

    def __call__(
        self,
        text: str | list[str],
        videos=None,
        qformer_text: str | list | None = None,
        src: list | None = None,
        return_metadata: bool = False,
        return_tensors: str | None = "pt",
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            text (`str` or `list` of `str`):
                Prompts, with `<image>` where a clip stands and `<vid>` where a time stands.
            videos (*optional*):
                The clips (videos and images alike) in order of appearance: for one prompt a clip or a list of clips,
                for several a list with an entry per prompt, or a flat list of all. See [`ETChatVideoProcessor`] for
                what a clip may be. A clip that appears more than once is read and encoded once.
            qformer_text (`str` or `list`, *optional*):
                The question that each placeholder's frames are compressed for: one text per placeholder, arranged as
                `videos`.
            src (`list` of `float`, or `list` of such lists, *optional*):
                For one prompt the time of each of its `<vid>` in order, in seconds; for several a list per prompt.
            return_metadata (`bool`, *optional*, defaults to `False`):
                Whether to add `frame_indices` and `video_metadata` of the clips, which the model does not take.
            kwargs:
                `fps`, `num_frames`, `max_frames`, `do_sample_frames` and `video_metadata` go to the video processor;
                `padding` (default: to the longest), `padding_side`, `max_length`, `truncation`, ... to the tokenizer;
                also grouped, as `videos_kwargs` and `text_kwargs`.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask` `(B, L)`; where there are clips `pixel_values`
            `(N, 3, size, size)`, `frame_times`, `placeholder_clips`, `qformer_input_ids` and
            `qformer_attention_mask` `(placeholders, words)`; where there is `src` `vid_times`.

        Raises:
            ValueError: if placeholders and clips, placeholders and texts, or `<vid>` and times differ in number, or a
                time is outside its clip.
        """
        texts = [text] if isinstance(text, str) else list(text)
        for group in GROUPED_KWARGS:
            kwargs |= kwargs.pop(group, {})
        video_kwargs = {key: kwargs.pop(key) for key in VIDEO_KWARGS if key in kwargs}
        if unknown := kwargs.keys() - set(TOKENIZER_KWARGS):
            raise TypeError(
                f"ETChatProcessor takes no {', '.join(sorted(unknown))}; images and videos alike go into videos."
            )
        counts = [prompt.count(IMAGE_TOKEN) for prompt in texts]
        rows = _arrange(videos, counts, single=isinstance(text, str), what="clip")
        clips, placeholder_clips = _unique(rows)
        data, metadata = {}, {}
        sizes = []
        if clips:
            data = dict(self._frames(clips, video_kwargs))
            data["placeholder_clips"] = placeholder_clips
            metadata = {key: data.pop(key) for key in ("frame_indices", "video_metadata")}
            questions = self._arrange_questions(qformer_text, counts, single=isinstance(text, str))
            data |= self._tokenize_questions(questions, placeholder_clips, data["frame_times"])
            sizes = [len(times) for times in data["frame_times"]]
        expanded = [
            _expand(prompt, [sizes[clip] for clip in row])
            for prompt, row in zip(texts, placeholder_clips, strict=True)
        ]
        kwargs.setdefault("padding", True)
        tokens = self.tokenizer(expanded, return_tensors=return_tensors, **kwargs)
        vid_times = self._check_times(texts, src, isinstance(text, str))
        if any(vid_times):
            self._check_inside(vid_times, placeholder_clips, metadata.get("video_metadata"), data.get("frame_times"))
            data["vid_times"] = vid_times
        if return_metadata:
            data |= metadata
        return BatchFeature({**tokens, **data})

    def _frames(self, clips: list, video_kwargs: dict) -> dict:
        encoded = [clip for clip in clips if isinstance(clip, EncodedClip)]
        if not encoded:
            return self.video_processor(clips, **video_kwargs)
        if len(encoded) < len(clips):
            raise ValueError(f"{len(encoded)} of {len(clips)} clips are encoded; encode all of a call, or none.")
        return {
            "vision_features": torch.cat([clip.vision_features for clip in encoded]),
            "frame_times": [clip.frame_times for clip in encoded],
            "frame_indices": [clip.frame_indices for clip in encoded],
            "video_metadata": [clip.metadata for clip in encoded],
        }

    def encode(self, clip, model, **video_kwargs) -> EncodedClip:
        """
        Reads a clip and passes it through the model's vision encoder, once for any number of questions; pixels are in
        memory a few frames at a time.

        Args:
            clip: see [`ETChatVideoProcessor`]; or what its `sample` returned.
            model ([`ETChatForConditionalGeneration`]): whose encoder and device are used.
            video_kwargs: `fps`, `num_frames`, `max_frames`, `video_metadata`.
        """
        sampled = clip if isinstance(clip, SampledClip) else self.video_processor.sample(clip, **video_kwargs)
        features, done = None, 0
        for pixels in self.video_processor.iter_pixels(sampled, ENCODED_AT_ONCE):
            part = model.get_vision_features(pixels.to(model.device))
            if features is None:
                features = part.new_empty(len(sampled.frame_times), *part.shape[1:])
            features[done : done + len(part)] = part
            done += len(part)
        return EncodedClip.of(sampled, features)

    @staticmethod
    def _arrange_questions(qformer_text, counts: list[int], single: bool) -> list[str]:
        rows = _arrange(qformer_text, counts, single, what="qformer_text")
        questions = [question for row in rows for question in row]
        for question in questions:
            if not isinstance(question, str):
                raise ValueError(f"qformer_text holds {question!r}; it must be a text per placeholder.")
        return questions

    def _tokenize_questions(self, questions: list[str], placeholder_clips, frame_times) -> dict:
        if self.use_time_tag:
            clips = [clip for row in placeholder_clips for clip in row]
            questions = [
                f"Current time: {round(time, 1)}s. {question}"
                for question, clip in zip(questions, clips, strict=True)
                for time in frame_times[clip]
            ]
        tokens = self.qformer_tokenizer(questions, padding=True, truncation=True, return_tensors="pt")
        return {"qformer_input_ids": tokens.input_ids, "qformer_attention_mask": tokens.attention_mask}

    @staticmethod
    def _check_times(texts: list[str], src, single: bool) -> list[list[float]]:
        rows = [[]] * len(texts) if src is None else [src] if single else src
        if len(rows) != len(texts):
            raise ValueError(f"src holds times for {len(rows)} prompts, but there are {len(texts)}.")
        rows = [list(row) if row is not None else [] for row in rows]
        for index, (prompt, times) in enumerate(zip(texts, rows, strict=True)):
            if (found := prompt.count(VID_TOKEN)) != len(times):
                raise ValueError(
                    f"Prompt {index} holds {found} {VID_TOKEN}, but src gives {len(times)} times; give one each."
                )
        return rows

    @staticmethod
    def _check_inside(vid_times, placeholder_clips, metadata, frame_times):
        for index, (times, clips) in enumerate(zip(vid_times, placeholder_clips, strict=True)):
            if times and not clips:
                raise ValueError(f"Prompt {index} has times in src, but no clip that they could belong to.")
            for time in times:
                end = max(metadata[clips[-1]]["duration"], frame_times[clips[-1]][-1])
                if not 0 <= time <= end:
                    raise ValueError(f"src holds {time} s, but the clip lasts from 0 to {end:.2f} s.")

    def apply_chat_template(
        self,
        conversation: list,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        return_assistant_tokens_mask: bool = False,
        src: list | None = None,
        reinsert_clips: bool = False,
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        """
        As `ProcessorMixin.apply_chat_template`. Content parts `{"type": "video" | "image", ...}` hold their clip under
        `video`, `image`, `path` or `url`; the Q-Former text of a placeholder is its message's text.

        Args:
            conversation (`list` of messages, or `list` of such lists):
                Messages `{"role", "content"}`, content a text or a list of parts.
            return_assistant_tokens_mask (`bool`, *optional*, defaults to `False`):
                Whether to add `assistant_masks` `(B, L)`: 1 for the assistant's text and end-of-turn token.
            src (`list`, *optional*): time of each `<vid>` of the conversation in order, in seconds; see `__call__`.
            reinsert_clips (`bool`, *optional*, defaults to `False`):
                Whether a user's message without a clip shows the clips of the one before again, as the model was
                trained: their frames are then compressed for its question, too.
            processor_kwargs (`dict`, *optional*):
                Arguments of `__call__`; those among `kwargs` are recognised too, all others go to the template.

        Returns:
            `str` (or a list of them); with `tokenize=True` the `input_ids`, with `return_dict=True` what `__call__`
            returns.

        Raises:
            ValueError: as `__call__`; also for clips outside user messages.
        """
        single = isinstance(conversation[0], dict)
        conversations = [conversation] if single else conversation
        if reinsert_clips:
            conversations = list(map(_with_clips_again, conversations))
        call_kwargs = {key: kwargs.pop(key) for key in CALL_KWARGS if key in kwargs} | (processor_kwargs or {})
        prompts, generated = render_jinja_template(
            conversations=[[_without_clips(message) for message in messages] for messages in conversations],
            chat_template=self._resolve_chat_template(chat_template),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            **self.tokenizer.special_tokens_map,
            **kwargs,
        )
        if not tokenize:
            return prompts[0] if single else prompts
        clips, questions = list(map(_clips, conversations)), list(map(_questions, conversations))
        inputs = self(
            text=prompts[0] if single else prompts,
            videos=clips[0] if single else clips,
            qformer_text=questions[0] if single else questions,
            src=src,
            return_tensors=return_tensors,
            return_offsets_mapping=return_assistant_tokens_mask,
            **call_kwargs,
        )
        if return_assistant_tokens_mask:
            inputs["assistant_masks"] = _assistant_masks(inputs, prompts, generated, return_tensors)
        return inputs if return_dict else inputs["input_ids"]

    def post_process(self, outputs: ETChatGenerateOutput) -> list[dict]:
        """
        Reads what `generate(..., return_dict_in_generate=True)` returned.

        Returns:
            `list` of `dict`, one per sequence:

            - **text** (`str`): the answer, each `<vid>` replaced by its seconds, rounded to 0.1.
            - **raw_text** (`str`): the answer with its `<vid>`, as a later turn of the conversation repeats it.
            - **timestamps** (`list` of `float`): the exact seconds of each `<vid>`.
            - **spans** (`list` of `[float, float]`): those that the text joins, as "`<vid>` - `<vid>`", in the order
              given.
            - **confidences** (`list` of `float`): the probability of each matched frame.
            - **frames** (`list` of `int`): index of each matched frame among the clip's sampled frames.

        Raises:
            TypeError: for token ids alone, which do not tell the times of `<vid>`.
        """
        if not isinstance(outputs, ModelOutput):
            raise TypeError(
                f"post_process got a {type(outputs).__name__}, which does not tell the times of <vid>; "
                "pass what generate(..., return_dict_in_generate=True) returns."
            )
        return [
            self._read_answer(sequence[outputs.prompt_length :].tolist(), matches)
            for sequence, matches in zip(outputs.sequences, outputs.matches, strict=True)
        ]

    def _decode(self, ids: list[int]) -> str:
        # As the original's transformers did: spaces before punctuation go where the tokenizer's configuration says.
        # A generated placeholder is just an id, of a token that the original's tokenizer does not have.
        ids = [token for token in ids if token != self.image_token_id]
        text = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return self.tokenizer.clean_up_tokenization(text) if self.tokenizer.clean_up_tokenization_spaces else text

    def _read_answer(self, ids: list[int], matches: list) -> dict:
        closing = set(self.tokenizer.all_special_ids) - {self.match_token_id}
        while ids and ids[-1] in closing:
            ids = ids[:-1]
        template = self._decode(ids).strip()
        seconds = [match.seconds for match in matches]
        starts = [found.start() for found in re.finditer(VID_TOKEN, template)]
        pairs = [found.span() for found in SPAN.finditer(template)]
        inside = [[i for i, start in enumerate(starts) if first <= start < last] for first, last in pairs]
        times = iter(seconds)
        return {
            "text": re.sub(VID_TOKEN, lambda found: _format_seconds(next(times, None)), template),
            "raw_text": template,
            "timestamps": seconds,
            "spans": [[seconds[i] for i in pair] for pair in inside if pair[-1] < len(seconds)],
            "confidences": [float(match.probabilities[match.frame]) for match in matches],
            "frames": [match.frame for match in matches],
        }


def _format_seconds(seconds: float | None) -> str:
    return VID_TOKEN if seconds is None else f"{seconds:.1f}".removesuffix(".0")


def _expand(prompt: str, sizes: list[int]) -> str:
    """One placeholder per frame."""
    pieces = prompt.split(IMAGE_TOKEN)
    return pieces[0] + "".join(IMAGE_TOKEN * size + piece for size, piece in zip(sizes, pieces[1:], strict=True))


def _arrange(values, counts: list[int], single: bool, what: str) -> list[list]:
    """Sorts `values`, given per prompt or flat, into one list per prompt with as many entries as placeholders."""
    total = sum(counts)
    if values is None:
        values = []
    if single:
        rows = [_row(values, total)]
    elif not isinstance(values, list | tuple):
        raise ValueError(f"With several prompts, give a list of {what}s.")
    elif len(values) == len(counts):
        rows = [_row(value, count) for value, count in zip(values, counts, strict=True)]
    else:
        rest = iter(values)
        rows = [[value for _, value in zip(range(count), rest, strict=False)] for count in counts]
        rows[-1].extend(rest)
    found = [len(row) for row in rows]
    if found != counts:
        raise ValueError(
            f"The prompts hold {counts if not single else total} {IMAGE_TOKEN} placeholders, but got "
            f"{found if not single else found[0]} {what}s; give one per placeholder."
        )
    return rows


def _row(value, count: int) -> list:
    if value is None:
        return []
    if isinstance(value, list | tuple) and (len(value) in (0, count) or count != 1):
        return list(value)
    return [value]


def _unique(rows: list[list]) -> tuple[list, list[list[int]]]:
    """The clips without repetition, and for each row the clip of each of its placeholders."""
    clips, known, placeholder_clips = [], {}, []
    for row in rows:
        indices = []
        for clip in row:
            key = os.fspath(clip) if isinstance(clip, str | os.PathLike) else id(clip)
            if key not in known:
                known[key] = len(clips)
                clips.append(clip)
            indices.append(known[key])
        placeholder_clips.append(indices)
    return clips, placeholder_clips


def _is_clip(part: dict) -> bool:
    return part.get("type") in CLIP_TYPES


def _without_clips(message: dict) -> dict:
    if isinstance(message.get("content"), str):
        return message
    parts = [{"type": part["type"]} if _is_clip(part) else part for part in message["content"]]
    return {**message, "content": parts}


def _with_clips_again(messages: list[dict]) -> list[dict]:
    shown, result = [], []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if message["role"] == "user":
            clips = [part for part in parts if _is_clip(part)]
            if not clips:
                message = {**message, "content": [*shown, *parts]}
            shown = clips or shown
        result.append(message)
    return result


def _clips(messages: list[dict]) -> list:
    clips = []
    for message in messages:
        for part in message["content"] if not isinstance(message["content"], str) else []:
            if not _is_clip(part):
                continue
            if message["role"] != "user":
                raise ValueError(
                    f"A message of role {message['role']!r} holds a {part['type']}; only users show clips."
                )
            found = [part[key] for key in CLIP_KEYS if part.get(key) is not None]
            if len(found) != 1:
                raise ValueError(f"A {part['type']} part needs exactly one of {CLIP_KEYS}; it has {sorted(part)}.")
            clips.append(found[0])
    return clips


def _questions(messages: list[dict]) -> list[str]:
    """Each placeholder's question: the text of its message, without placeholders."""
    questions = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            text, placeholders = content, content.count(IMAGE_TOKEN)
        else:
            text = "".join(part["text"] for part in content if part.get("type") == "text")
            placeholders = sum(map(_is_clip, content)) + text.count(IMAGE_TOKEN)
        questions += [text.replace(IMAGE_TOKEN, "").strip()] * placeholders
    return questions


def _assistant_masks(inputs: BatchFeature, prompts: list[str], generated: list, return_tensors: str | None):
    """1 for tokens within the assistant's parts of the prompts, whose placeholders have been expanded since."""
    offsets, attention = _as_lists(inputs.pop("offset_mapping")), _as_lists(inputs["attention_mask"])
    clips = inputs.get("placeholder_clips", [[]] * len(prompts))
    masks = []
    for prompt, spans, row, tokens, attended in zip(prompts, generated, clips, offsets, attention, strict=True):
        sizes = [len(inputs["frame_times"][clip]) for clip in row]
        places = [found.end() for found in re.finditer(IMAGE_TOKEN, prompt)]
        growth = [(place, len(IMAGE_TOKEN) * (size - 1)) for place, size in zip(places, sizes, strict=True)]
        spans = [[char + sum(more for place, more in growth if place <= char) for char in span] for span in spans]
        inside = [any(s <= a < e or a < s < b for s, e in spans) for a, b in tokens]
        masks.append([int(hit and kept) for hit, kept in zip(inside, attended, strict=True)])
    return torch.tensor(masks) if return_tensors == "pt" else masks


def _as_lists(values) -> list:
    return values.tolist() if isinstance(values, torch.Tensor) else values


__all__ = ["ETChatProcessor", "EncodedClip"]
