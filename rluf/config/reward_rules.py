"""Rules between the settings of reward models; see rluf.config.rules."""

from __future__ import annotations

from rluf.config.objectives import find_objective_spec
from rluf.config.run import READER_MODEL
from rluf.config.tree import SettingsTree

REACTION_FACTORS = ("context", "users", "propensity")


def check_reward_losses(settings: SettingsTree) -> str | None:
    """Pairs train with bradley_terry, single responses with a loss of labels, reactions alone with nnpu."""
    for name, model in settings.reward.by_objective.items():
        spec = find_objective_spec(name)
        has_pairs = spec.data_kind == "pairs"
        if (model.loss == "bradley_terry") != has_pairs:
            data = "pairs of responses" if has_pairs else "single responses with a label"
            return (
                f"reward.{name}.loss={model.loss} does not fit its data, {data}; set "
                f"reward.{name}.loss={spec.default_loss}"
            )
        if model.loss == "nnpu" and spec.data_kind != "reactions":
            return (
                f"reward.{name}.loss=nnpu takes rows of label 0 for unlabeled, but raters judged those of {name}; set "
                f"reward.{name}.loss={spec.default_loss}"
            )
        if model.loss == "nnpu" and "thumbs" in settings.reward.shared_backbone_heads:
            return (
                f"reward.{name}.loss=nnpu takes rows of label 0 for unlabeled, but those of the head thumbs in "
                "reward.shared_backbone_heads are thumbs down; remove the head, or set "
                f"reward.{name}.loss={spec.default_loss}"
            )
    return None


def check_trained_parts(settings: SettingsTree) -> str | None:
    """Without epochs and linear probe the head would stay random; LoRA needs trained layers."""
    for name, model in settings.reward.by_objective.items():
        if model.epochs == 0 and not model.linear_probe:
            return (
                f"reward.{name}.epochs=0 and reward.{name}.linear_probe=false would train nothing; set "
                f"reward.{name}.linear_probe=true or reward.{name}.epochs=1"
            )
        if model.lora_rank and (model.epochs == 0 or model.frozen_share == 1):
            return (
                f"reward.{name}.lora_rank={model.lora_rank} would add adapters to layers that are not trained "
                f"(reward.{name}.epochs={model.epochs}, reward.{name}.frozen_share={model.frozen_share:g}); set "
                f"reward.{name}.lora_rank=0, or epochs above 0 and frozen_share below 1"
            )
    return None


def check_debias(settings: SettingsTree) -> str | None:
    """context, users and propensity correct for who reacts, so they apply to reactions, not to raters' judgments."""
    for name, model in settings.reward.by_objective.items():
        has_reactions = find_objective_spec(name).data_kind == "reactions"
        misplaced = [factor for factor in model.debias if factor in REACTION_FACTORS and not has_reactions]
        if misplaced:
            return (
                f"reward.{name}.debias={list(model.debias)}: {misplaced[0]} corrects for who reacts, but "
                f"reward.{name}.loss={model.loss} trains on raters' judgments; remove {misplaced[0]} from debias"
            )
        if "context" in model.debias and (model.epochs or not model.linear_probe):
            return (
                f"reward.{name}.debias={list(model.debias)}: context is a covariate of a fitted head, but "
                f"reward.{name}.epochs={model.epochs} and linear_probe={str(model.linear_probe).lower()}; set epochs=0 "
                "and linear_probe=true, or use propensity instead"
            )
    return None


def check_members(settings: SettingsTree) -> str | None:
    """An ensemble's first member is on the section's own backbone; shared heads allow no other backbone."""
    shared_heads = settings.reward.shared_backbone_heads
    for name, model in settings.reward.by_objective.items():
        first_member = model.member_specs[0]
        if not first_member.uses_section_backbone:
            return (
                f"reward.{name}.ensemble.members starts with a member on backbone {first_member.backbone} that has "
                f"`backbone`, `input` or `pooling`, but reward.{name}.backbone={model.backbone}; put a member without "
                f"them first, or set reward.{name}.backbone to the other one"
            )
        # Heads share one forward pass, which a member on another backbone cannot use.
        foreign = [member for member in model.member_specs if not member.uses_section_backbone]
        if foreign and shared_heads and model is settings.reward.get_head_settings(shared_heads[0]):
            return (
                f"reward.shared_backbone_heads={list(shared_heads)} share one backbone, but "
                f"reward.{name}.ensemble.members adds {foreign[0].backbone} ({foreign[0].layers} layers); keep members "
                "without `backbone`, `input` and `pooling` only, or set reward.shared_backbone_heads=[]"
            )
    return None


def check_shared_head(settings: SettingsTree) -> str | None:
    """One head over several members is fitted, not trained, and has no ensemble spread."""
    for name, model in settings.reward.by_objective.items():
        if not model.ensemble.shared_head:
            continue
        member_count = len(model.member_specs)
        if member_count < 2:
            return (
                f"reward.{name}.ensemble.shared_head=true needs several members, but reward.{name}.ensemble.members "
                f"has {member_count}; add members, or set reward.{name}.ensemble.shared_head=false"
            )
        if model.epochs or not model.linear_probe:
            return (
                f"reward.{name}.ensemble.shared_head=true fits one head on frozen members, but reward.{name}.epochs="
                f"{model.epochs} and reward.{name}.linear_probe={str(model.linear_probe).lower()}; set epochs=0 and "
                f"linear_probe=true, or reward.{name}.ensemble.shared_head=false"
            )
        if settings.aggregation.uncertainty_penalty:
            return (
                f"aggregation.uncertainty_penalty={settings.aggregation.uncertainty_penalty:g} needs the spread of an "
                f"ensemble, which reward.{name}.ensemble.shared_head=true does not have; set one of them to its default"
            )
    return None


def check_uncertainty_penalty(settings: SettingsTree) -> str | None:
    """The penalty needs an objective whose model is an ensemble, or may be: a service or a folder."""
    penalty = settings.aggregation.uncertainty_penalty
    if not penalty or any(
        objective.source == "serve"
        or (
            objective.source == "model"
            and (objective.path is not None or len(settings.reward.get_head_settings(name).member_specs) > 1)
        )
        for name, objective in settings.objectives.by_objective.items()
    ):
        return None
    return (
        f"aggregation.uncertainty_penalty={penalty:g} needs the spread of an ensemble, but no objective has one; set "
        "it to 0, or reward.<objective>.ensemble.members to several members"
    )


def check_shared_backbone(settings: SettingsTree) -> str | None:
    """Shared heads are two or more, each once, and trained together; elastic workers exclude ZeRO."""
    reward = settings.reward
    heads = reward.shared_backbone_heads
    if heads and len(set(heads)) < max(2, len(heads)):
        return (
            f"reward.shared_backbone_heads={list(heads)} must name two heads or more, each once; set it to [] for none"
        )
    if set(reward.objectives) & set(heads) and not set(heads) <= set(reward.objectives):
        return (
            f"reward.objectives={list(reward.objectives)} omits heads that reward.shared_backbone_heads={list(heads)} "
            "train together; set reward.objectives=[] for all of them, or reward.shared_backbone_heads=[]"
        )
    if not isinstance(reward.workers, int):
        min_workers, max_workers = reward.workers
        if min_workers > max_workers:
            return f"reward.workers={list(reward.workers)} has its minimum above its maximum; set the smaller first"
        if reward.zero_stage:
            return (
                f"reward.workers={list(reward.workers)} may change during training, but reward.zero_stage="
                f"{reward.zero_stage} shards the optimizer state by their number; set reward.zero_stage=0 or one number"
            )
    return None


def check_reader_independence(settings: SettingsTree) -> str | None:
    """No reward model of a run stands on the model that judges the run for the simulated users.

    There is no setting to allow it: a policy trained on the judge's own features scores well whatever it says, so the
    comparison by simulated users would not be evidence. The report's other parts do not need them.
    """
    if not settings.evaluate.simulated_users:
        return None
    for name, model in settings.reward.by_objective.items():
        if any(READER_MODEL in member.backbone.lower() for member in model.member_specs):
            return (
                f"reward.{name} uses backbone {READER_MODEL}, which also reads for evaluate.simulated_users="
                f"{settings.evaluate.simulated_users}: the run would be judged by its own reward features; set "
                f"evaluate.simulated_users=0, or reward.{name}.backbone and members to another model such as minilm"
            )
    return None
