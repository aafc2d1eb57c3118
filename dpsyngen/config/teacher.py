"""The teacher: a DP classifier of the private images that says which class a drawn image shows."""

from dataclasses import dataclass

from dpsyngen.config.checks import require


@dataclass(frozen=True)
class TeacherConfig:
    """A linear classifier on scattering features, trained by noisy gradient descent over all private images."""

    share: float = 0.0
    """The share of the privacy budget that it may spend, in the Gaussian-DP mu^2 scale; 0 for no teacher."""
    steps: int = 30
    """Steps of gradient descent; each sees every private image and is a Gaussian mechanism."""
    learning_rate: float = 20.0
    """Of its steps, with momentum 0.9; features have norm 1."""
    components: int = 400
    """Directions of the features that are kept: those along which programmatic images differ most."""
    images: int = 2000
    """Programmatic images that these directions are found from."""

    def __post_init__(self) -> None:
        require(0 <= self.share < 1, "teacher.share", "a number in [0, 1)", self.share)
        require(self.steps >= 1, "teacher.steps", "an integer >= 1", self.steps)
        require(self.learning_rate > 0, "teacher.learning_rate", "a number > 0", self.learning_rate)
        require(self.components >= 1, "teacher.components", "an integer >= 1", self.components)
        require(self.images > self.components, "teacher.images", f"more than teacher.components = {self.components}", self.images)

    @property
    def used(self) -> bool:
        """Whether there is one."""
        return self.share > 0
