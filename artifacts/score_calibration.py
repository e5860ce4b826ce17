"""The calibration of scores that a manifest may have, see `ettin-calibrate`."""

from pydantic import BaseModel, ConfigDict, Field, PositiveInt


class Strict(BaseModel):
    """Refuses unknown keys, other types, and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Reliability(Strict):
    """How well probabilities fit labels; 0 is best."""

    brier: float = Field(description="mean squared error")
    expected_calibration_error: float = Field(description="mean distance to the share of relevant pairs, in ten bins")


class ScoreCalibration(Strict):
    """sigmoid(slope · logit + offset) is the probability of relevance, as fitted on pairs that a user labelled."""

    slope: float = Field(gt=0, le=1e6)
    offset: float = Field(ge=-1e9, le=1e9)
    pairs: PositiveInt
    relevant: PositiveInt
    before: Reliability = Field(description="of sigmoid(logit)")
    after: Reliability = Field(description="on pairs that took no part in the fit (cross-validation)")
