"""The toy's model: every part of E.T. Chat at the smallest size that still learns.

Its vision encoder keeps the random weights it begins with: random features of a frame tell colours and shapes apart,
and what is learned is the same as in the real model, namely everything else.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertTokenizerFast, GenerationConfig, PreTrainedTokenizerFast

from ..chat_templates import load_chat_template
from ..configuration_etchat import ETChatConfig
from ..modeling_etchat import ETChatForConditionalGeneration
from ..processing_etchat import ETChatProcessor
from ..video_processing_etchat import ETChatVideoProcessor
from .annotations import CAPTION_QUESTIONS, CHOICE_QUESTION, COLOR_QUESTION, QUESTIONS, WHICH_QUESTIONS
from .world import COLORS, SHAPES

IMAGE_SIZE = 56
# At these widths the usual 0.02 lets signals die out: 0.1 is one over the square root of the language model's width.
INITIALIZER_RANGE = 0.1
PHI3_TOKENS = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ANSWER_WORDS = " - , a shape. (A) (B) (C) (D) , then a and a. You are a helpful AI assistant."


def _sentences() -> list[str]:
    """Everything that is ever said in the toy world, once."""
    names = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    templates = [text for texts in QUESTIONS.values() for text in texts]
    texts = [
        *CAPTION_QUESTIONS,
        *WHICH_QUESTIONS,
        CHOICE_QUESTION,
        COLOR_QUESTION,
        *templates,
        ANSWER_WORDS,
        "You are a helpful AI assistant.",
    ]
    return [text.replace("<vid>", " ") for text in texts] + [f"a {name}. the {name}" for name in names]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with phi3's special tokens; it reads any text, and the toy's words as one token."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=list(PHI3_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(_sentences() * 3), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(PHI3_TOKENS[4:]),
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_qformer_tokenizer() -> BertTokenizerFast:
    """BERT's tokenizer over the toy's words, with letters for all others, and `[DEC]`."""
    splitter = pre_tokenizers.BertPreTokenizer()
    words = {word for text in _sentences() for word, _ in splitter.pre_tokenize_str(text.lower())}
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [*BERT_TOKENS, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary += sorted(words - set(vocabulary))
    tokenizer = BertTokenizerFast(
        vocab={word: index for index, word in enumerate(vocabulary)}, do_lower_case=True, truncation_side="left",
        model_max_length=256,
    )  # fmt: skip
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def build_processor() -> ETChatProcessor:
    """The toy's processor, with the template of stage 1."""
    return ETChatProcessor(
        ETChatVideoProcessor(size=IMAGE_SIZE),
        build_tokenizer(),
        build_qformer_tokenizer(),
        load_chat_template("plain"),
    )


def build_model(processor: ETChatProcessor) -> ETChatForConditionalGeneration:
    """A fresh model as stage 1 finds it: no matching yet. Seed torch before."""
    config = ETChatConfig(
        vision_config={"image_size": IMAGE_SIZE, "patch_size": 14, **_sizes(width=48, layers=2)},
        qformer_config={
            "vocab_size": len(processor.qformer_tokenizer),
            "max_position_embeddings": 256,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            **_sizes(width=32, layers=2),
        },
        text_config={
            "model_type": "phi3",
            "vocab_size": processor.image_token_id,  # the placeholder, added last, needs no row
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 512,
            "sliding_window": None,
            "bos_token_id": processor.tokenizer.bos_token_id,
            "eos_token_id": processor.tokenizer.eos_token_id,
            "pad_token_id": processor.tokenizer.pad_token_id,
            **_sizes(width=96, layers=4),
        },
        num_query_tokens=8,
        image_token_id=processor.image_token_id,
        match_token_id=processor.match_token_id,
        use_matching=False,
        bi_attention=False,
        initializer_range=INITIALIZER_RANGE,
    )
    model = ETChatForConditionalGeneration(config)
    end = processor.tokenizer.convert_tokens_to_ids("<|end|>")
    model.generation_config = GenerationConfig(
        eos_token_id=[end, config.text_config.eos_token_id],
        pad_token_id=config.text_config.pad_token_id,
    )
    return model


def _sizes(width: int, layers: int) -> dict:
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "initializer_range": INITIALIZER_RANGE,
    }
