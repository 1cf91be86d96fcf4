"""What goes over the wire, in the shapes of OpenAI's completions where those have one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    WithJsonSchema,
    model_validator,
)

ID = r"^[A-Za-z0-9_-]{1,64}$"
MemoryId = Annotated[str, Field(pattern=ID, description="Letters, digits, - or _.")]

# A list ends at its first bad element: each would be an error of its own, and a body holds a million.
_Ids = Annotated[list[int], Field(fail_fast=True)]
_Texts = Annotated[list[str], Field(fail_fast=True)]
_Edits = Annotated[list[float], Field(fail_fast=True)]


def _kind_of_prompt(given: Any) -> str:  # noqa: ANN401 - any JSON
    """Which form of a prompt is meant, by its first element: the others then have no errors to tell of."""
    if not isinstance(given, list):
        return "str"
    first = given[0] if given else 0
    if isinstance(first, list):
        return "list[list[int]]"
    return "list[str]" if isinstance(first, str) else "list[int]"


_Prompt = Annotated[
    Annotated[str, Tag("str")]
    | Annotated[_Ids, Tag("list[int]")]
    | Annotated[_Texts, Tag("list[str]")]
    | Annotated[list[_Ids], Field(fail_fast=True), Tag("list[list[int]]")],
    Discriminator(_kind_of_prompt),
    WithJsonSchema(TypeAdapter(str | list[int] | list[str] | list[list[int]]).json_schema()),
]


class _Strict(BaseModel):
    """A field that is not known is an error: nothing that a caller asks for is passed over."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _with_one_unknown(cls, given: Any) -> Any:  # noqa: ANN401 - any JSON
        """Leave one unknown field of many: each would be an error of its own."""
        if not isinstance(given, dict):
            return given
        known = cls.model_fields
        unknown = [name for name in given if name not in known][:1]
        return {name: given[name] for name in [*(name for name in known if name in given), *unknown]}


class Editing(_Strict):
    """How a memory learns; what is left out is as the bundle recommends."""

    edit: float | _Edits | None = Field(None, description="Strength of the fused rule, 0 to 1.")
    editor: str | None = Field(
        None, max_length=500, description="As the command line takes it, readout:step=1,chunk=4; or none."
    )


class StreamOptions(_Strict):
    """OpenAI's."""

    include_usage: bool = False


class CompletionRequest(_Strict):
    """OpenAI's completion request; `memory`, `save`, `learn`, `editing`, `top_k` and `timeout` are added."""

    model: str | None = Field(None, description="Checked against the one that is served, where it is given.")
    prompt: _Prompt = Field("", description="Text, token ids, or up to 16 of either without a memory.")
    max_tokens: int = Field(16, ge=0)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=2**31)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | _Texts | None = Field(None, description="Up to 4 texts.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    echo: bool = Field(False, description="Give the prompt back, with its log-probabilities if asked for.")
    logprobs: int | None = Field(None, ge=0, le=5)
    user: str | None = Field(None, max_length=256, description="Accepted, and not used.")
    n: Literal[1] = 1
    best_of: Literal[1] = 1
    suffix: None = None
    logit_bias: None = None
    presence_penalty: Literal[0] = 0
    frequency_penalty: Literal[0] = 0
    memory: MemoryId | None = Field(None, description="Continue with it, and let it learn.")
    save: bool = Field(True, description="Save the memory before the answer ends.")
    learn: bool = Field(False, description="Learn from what is drawn, too.")
    editing: Editing | None = Field(None, description="Without a memory only: a memory has its own.")
    timeout: float | None = Field(None, gt=0, description="Seconds; the server has a limit of its own.")

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, given: Any) -> Any:  # noqa: ANN401 - whatever was sent
        if not isinstance(given, dict):
            return given
        return {
            name: value for name, value in given.items() if value is not None or name not in cls.model_fields
        }


class Logprobs(BaseModel):
    """OpenAI's; a token that is no printable ASCII is `bytes:` and its hexadecimal."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class Memory(BaseModel):
    """A memory, but for its state."""

    id: str
    object: Literal["memory"] = "memory"
    version: str = Field(description="Changes with every save.")
    position: int = Field(description="Tokens seen.")
    saved: bool = Field(description="Whether the store has it as it stands.")
    bytes: int
    created: int
    expires: float | None
    edit: list[float]
    editor: dict[str, Any] | None
    damaged: bool = Field(False, description="The store cannot read it; it can be deleted. In lists only.")


class Choice(BaseModel):
    """One answer, or a part of it."""

    text: str
    index: int
    logprobs: Logprobs | None
    finish_reason: str | None = Field(description="stop, length, timeout or closed; null for a part.")


class Usage(BaseModel):
    """Tokens seen."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """OpenAI's completion, or a part of one in a stream, with the memory where there is one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None
    memory: Memory | None = None


class NewMemory(_Strict):
    """A memory to create, or a fork."""

    id: MemoryId | None = Field(None, description="A new one where it is left out.")


class NewEditedMemory(NewMemory):
    """A memory to create."""

    editing: Editing | None = None


class MemoryList(BaseModel):
    """All memories of the caller."""

    object: Literal["list"] = "list"
    data: list[Memory]


class TensorDifference(BaseModel):
    """One tensor of two memories."""

    name: str
    norms: tuple[float, float]
    distance: float
    changed: float
    relative: float


class Comparison(BaseModel):
    """Two memories, tensor by tensor."""

    object: Literal["list"] = "list"
    data: list[TensorDifference]


class Deleted(BaseModel):
    """OpenAI's answer to a deletion."""

    id: str
    object: Literal["memory"] = "memory"
    deleted: Literal[True] = True


class ServedModel(BaseModel):
    """OpenAI's description of a model, and the bundle's identity."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    identity: str
    state_bytes: int


class ModelList(BaseModel):
    """The one model."""

    object: Literal["list"] = "list"
    data: list[ServedModel]


class Health(BaseModel):
    """Whether requests are taken, and how many are here."""

    status: Literal["ok", "closing"]
    running: int
    waiting: int
    process: int = Field(description="Which of several servers answered.")


class ErrorBody(BaseModel):
    """OpenAI's error."""

    message: str
    type: str
    code: str | None = None
    param: str | None = None


class Problem(BaseModel):
    """An answer that is none."""

    error: ErrorBody
