"""Bodies of the REST interface, which its OpenAPI description is made from."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field

from fbclip.runtime.regions import MAX_REGIONS

VERDICT = "good, defect, unusable (it shows nothing) or absent (the part is not in it)."


class Problem(BaseModel):
    detail: str = Field(description="One line: what was wrong.")


def _without_sign(value: float) -> float:
    return value + 0.0  # of -0.0, 0.0


class ThresholdBody(BaseModel):
    threshold: Annotated[float, AfterValidator(_without_sign)] = Field(
        ge=0, le=1, strict=True, allow_inf_nan=False, description="Scores from here on are anomalous."
    )


class RegionBody(BaseModel):
    box: tuple[int, int, int, int] = Field(description="x0, y0, x1, y1 in pixels; x1 and y1 are exclusive.")
    peak: float = Field(description="Highest value of the map in it, 0 to 1.")
    area: int = Field(description="In pixels.")
    weak: bool = Field(False, description="Below the map's threshold: where it is highest, for the score reaches its.")
    length: float | None = Field(None, description="The longest it extends, in pixels.")
    mean: float | None = Field(None, description="Of the map's values in it, 0 to 1.")
    area_mm2: float | None = Field(None, description="In mm2, where it is known how much a pixel shows.")
    length_mm: float | None = Field(None, description="In mm, likewise.")
    place: tuple[float, float] | None = Field(
        None,
        description="Its centre, x and y in 0 to 1 of the part's width and height: beyond that it is beside the part.",
    )


class ScoredBody(BaseModel):
    score: float = Field(allow_inf_nan=False, description="Abnormal probability of the image, 0 to 1.")
    threshold: float
    is_anomalous: bool = Field(description="Not known to be good: a defect, unusable or absent.")
    verdict: str = Field(description=VERDICT)
    overruled: str | None = Field(description="Why it is good against its score: min_area or roi.")
    unusable: str | None = Field(
        description="Why there is nothing to judge: black, uniform, frozen, dark, bright, blurred or green."
    )
    memory: str | None = Field(description="Name of the memory of good parts that scored; null of the zero-shot model.")
    regions: list[RegionBody] = Field(
        description=f"Of the map at or above its threshold, the highest peak first, {MAX_REGIONS} at most."
    )
    width: int
    height: int
    timings_ms: dict[str, float]
    overlay_png: str | None = Field(description="With overlay=1: heat map, contours and verdict, PNG in base64.")
    map_png: str | None = Field(description="With map=1: the anomaly map, 16-bit grey (65535 is 1), PNG in base64.")


class EventBody(BaseModel):
    id: int
    source: str
    index: int = Field(description="Number of the frame in its source.")
    time: float = Field(description="Seconds since 1970 when it was captured.")
    score: float
    threshold: float
    is_anomalous: bool
    verdict: str = Field("defect", description=VERDICT)
    overruled: str | None = None
    unusable: str | None = None
    memory: str | None = None
    regions: list[RegionBody]
    alarm: bool
    timings_ms: dict[str, float]


class MemoryBody(BaseModel):
    name: str = Field(description="The first twelve digits of its hash.")
    good_parts: int = Field(description="How many taught it.")
    mode: str = Field(description="whiten, nearest or positions.")


class CalibrationBody(BaseModel):
    made: str | None = Field(description="When, ISO 8601; null of one that an older release made.")
    good_images: int = Field(description="How many it was made from.")
    false_alarm_rate: float = Field(description="What was asked for.")


class ModelBody(BaseModel):
    name: str = Field(description="The bundle's: that of its folder.")
    sha256: str = Field(description="The bundle's: of its manifest, which has the hashes of all its files.")
    device: str
    precision: str
    image_size: int
    memory: MemoryBody | None = Field(description="What good parts taught; null of the zero-shot model.")
    calibration: CalibrationBody | None = Field(description="The one in use; null without.")


class StatusBody(BaseModel):
    version: str = Field(description="Of fbclip.")
    time: float = Field(description="The server's clock, seconds since 1970.")
    model: ModelBody
    threshold: float
    login: bool = Field(description="Whether a token is needed.")
    uploads: int = Field(description="Images being sent, waiting or in work.")
    viewers: int = Field(description="Pages that watch.")
    fault: str | None = Field(description="Why the last image that was sent could not be judged; null if it was.")
    pipeline: dict[str, Any] | None = Field(description="Camera, rates and ages; null where there is no source.")


class HealthBody(BaseModel):
    status: str = Field(description="ok, or why not.")
