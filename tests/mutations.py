"""Deliberate breaks of the guarantee, as data: each must turn one of its tests red.

`tests/mutate.py` (make test-mutations) patches them one at a time into a copy of the code and runs the tests; `test_mutations.py`
keeps the list from rotting. Add one for every rule that a new mechanism has to keep to.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One break: in `file`, `before` (which occurs once) becomes `after`, and at least one of `tests` (FILE::FUNCTION in tests/) fails.

    `rule` is the rule that it breaks, numbered as in the headings of test_privacy_rules.py.
    """

    name: str
    rule: int
    file: str
    before: str
    after: str
    tests: tuple[str, ...]


def _in(file: str) -> Callable[..., tuple[str, ...]]:
    """What names tests of one file by the part after test_."""
    return lambda *names: tuple(f"{file}::test_{name}" for name in names)


_rules = _in("test_privacy_rules.py")
_plan = _in("test_plan.py")
_gradients = _in("test_per_example.py")
_ledger = _in("test_ledger.py")
_secure = _in("test_secure_noise.py")
_resume = _in("test_resume.py")
_repeats = _in("test_repeats.py")
_select = _in("test_select.py")
_replay = _in("test_replay.py")
_custom = _in("test_custom_stages.py")
_prototypes = _in("test_prototypes.py")
_covariance = _in("test_covariance.py")
_teacher = _in("test_teacher.py")
_multiplicity = _in("test_multiplicity.py")
_central = _in("test_central.py")
_attempts = _in("test_attempts.py")

STEP = "dpsyngen/privacy/private_step.py"
LOSS = "dpsyngen/loss.py"
REPLAY = "dpsyngen/replay.py"
CONFIG = "dpsyngen/config/__init__.py"
PHASES = "dpsyngen/phases.py"
TRAINING = "dpsyngen/training.py"
REPEATS = "dpsyngen/privacy/repeats.py"
SELECT = "dpsyngen/sweep/select.py"
TERMS = "dpsyngen/sweep/terms.py"
SCORE = "dpsyngen/sweep/score.py"
CHECKPOINT = "dpsyngen/checkpoint.py"
GRADIENTS = "dpsyngen/privacy/per_example.py"
LAYERS = "dpsyngen/privacy/layer_gradients.py"
PLAN = "dpsyngen/privacy/plan.py"
RANDOMNESS = "dpsyngen/privacy/randomness.py"
MEANS = "dpsyngen/privacy/class_means.py"
COVARIANCE = "dpsyngen/privacy/covariance.py"
TEACHER = "dpsyngen/privacy/teacher.py"
JOURNAL = "dpsyngen/privacy/journal.py"
LEDGER = "dpsyngen/privacy/ledger.py"
ACCOUNTING = "dpsyngen/privacy/accounting.py"
REPORT = "dpsyngen/privacy/report.py"
CONTINUATION = "dpsyngen/privacy/continuation.py"
RUN = "dpsyngen/run_directory.py"
SAFETY = "dpsyngen/networks/safety.py"
TRACKING = "dpsyngen/tracking.py"

ONE_IMAGE = _rules("removing_an_image_moves_the_sum_by_at_most_c")
AT_MOST_C = _rules("contribution_is_at_most_c_for_any_magnitude", "contribution_is_at_most_c_where_float32_sums_go_wrong")
BRUTE_FORCE = _rules("private_step_is_what_a_loop_over_images_computes")
NOISE = _rules("noise_is_added_once_with_deviation_sigma_c_and_divided_by_the_expected_size")
EMPTY = _rules("empty_batch_is_a_step_of_pure_noise")
PRICE = _rules("price_of_full_batches_and_class_means_is_the_closed_form")
ADDED = _replay("the_public_gradient_is_added_to_the_finished_private_one")
SAME_BITS = _replay("the_private_gradient_is_the_same_bits_with_replay_and_without")
UNAWARE = _replay("the_public_gradient_depends_on_no_private_image_and_not_on_the_key")
TURNS = _custom("private_stages_of_their_own_networks_take_turns_by_weight_and_not_by_data")
NOISY_COUNTS = _rules("class_means_noise_reaches_the_counts")

MUTATIONS = (
    # Rule 2: Poisson batches, empty ones included.
    Mutation(
        "shuffled batches of a fixed size", 2, RANDOMNESS,
        "    drawn: list[np.ndarray] = []\n",
        "    return np.sort(rng.choice(population, round(population * probability), replace=False))\n    drawn: list[np.ndarray] = []\n",
        _rules("poisson_inclusion_is_independent_with_probability_q"),
    ),
    Mutation(
        "empty batch skipped", 2, STEP,
        "        total = {name: torch.zeros_like",
        "        if len(batch) == 0:\n            return {}\n        total = {name: torch.zeros_like",
        EMPTY,
    ),
    Mutation(
        "sampling rate from the true size", 2, PLAN,
        "key.substream(\"batch\", attempt=attempt, step=step), population, self.sampling_rate)",
        "key.substream(\"batch\", attempt=attempt, step=step), population, min(1.0, self.batch_size / max(1, population)))",
        _rules("batch_is_drawn_at_the_declared_rate_whatever_the_size"),
    ),
    # Rule 3: the contribution of one image.
    Mutation(
        "clip before averaging over K", 3, STEP,
        "with recording(self.denoiser, len(rows), copies) as record:",
        "with recording(self.denoiser, len(rows) * copies, 1) as record:\n"
        "            record.clipped_sum = lambda c, *how: PerExampleGradients.clipped_sum(record, c / copies, *how)",
        BRUTE_FORCE,
    ),
    Mutation(
        "K rows counted as examples", 3, STEP,
        "recording(self.denoiser, len(rows), copies)",
        "recording(self.denoiser, len(rows) * copies, 1)",
        ONE_IMAGE,
    ),
    Mutation(
        "rows of one image spread over the batch", 3, STEP,
        "labels.repeat_interleave(copies)",
        "labels.repeat(copies)",
        BRUTE_FORCE,
    ),
    Mutation(
        "strata spread over several images", 3, LOSS,
        "stratified(uniform, copies // twins)",
        "stratified(uniform, len(uniform))",
        _multiplicity("an_image_has_one_sigma_in_each_stratum_and_all_together_follow_the_draw"),
    ),
    Mutation(
        "opposite noise for another image", 3, LOSS,
        "torch.stack([noise, -noise], dim=1).flatten(0, 1)",
        "torch.cat([noise, -noise])",
        _multiplicity("opposite_noise_comes_in_pairs_of_an_image_with_one_sigma"),
    ),
    Mutation(
        "rows mixed with another image", 3, LOSS,
        "x = moved(x, draws.moves)",
        "x = moved(0.9 * x + 0.1 * x.flip(0), draws.moves)",
        _multiplicity("an_images_rows_are_made_of_that_image_alone"),
    ),
    Mutation(
        "stage chosen by the data", 3, STEP,
        "turns(self.weights, np.array(step))",
        "turns(self.weights, np.array(step + len(self.steps[0].dataset)))",
        TURNS,
    ),
    Mutation(
        "networks whose turn it isn't trained on old gradients", 3, STEP,
        "                parameter.grad = None\n",
        "                parameter.grad = parameter.grad\n",
        TURNS,
    ),
    Mutation(
        "mean instead of sum over examples", 3, STEP,
        "losses.sum().backward()",
        "losses.mean().backward()",
        BRUTE_FORCE,
    ),
    Mutation(
        "clipped above C", 3, GRADIENTS,
        "clipping_norm * (1 - MARGIN)",
        "clipping_norm * (1 + MARGIN)",
        AT_MOST_C,
    ),
    Mutation(
        "automatic clipping by half the norm", 3, GRADIENTS,
        "limit / (norms + stability)",
        "limit / (0.5 * norms + stability)",
        AT_MOST_C + ONE_IMAGE,
    ),
    Mutation(
        "outer products too long for float32 let through", 3, LAYERS,
        "(lengths > _LONGEST_VECTOR)",
        "(lengths > torch.inf)",
        _rules("contribution_is_at_most_c_for_outer_products_of_any_magnitude"),
    ),
    Mutation(
        "not clipped", 3, GRADIENTS,
        "max=1.0) if stability",
        "min=1.0) if stability",
        AT_MOST_C + ONE_IMAGE,
    ),
    Mutation(
        "each parameter clipped apart", 3, GRADIENTS,
        "        scale, finite = self._scale(clipping_norm, stability)\n        keep = None",
        "        if len(self.gradients) > 1:\n"
        "            apart = {name: PerExampleGradients(self.examples) for name in self.gradients}\n"
        "            for name, one in apart.items():\n"
        "                one.add(name, self.gradients[name])\n"
        "            return {name: one.clipped_sum(clipping_norm)[name] for name, one in apart.items()}\n"
        "        scale, finite = self._scale(clipping_norm, stability)\n        keep = None",
        AT_MOST_C + ONE_IMAGE,
    ),
    Mutation(
        "float32 norm", 3, GRADIENTS,
        "_row_norms(_in_memory_order(gradient)[0].flatten(start_dim=1))",
        "torch.linalg.vector_norm(_in_memory_order(gradient)[0].flatten(start_dim=1).float(), dim=1).double()",
        AT_MOST_C,
    ),
    Mutation(
        "bf16 norm without its margin", 3, GRADIENTS,
        "norms * (1 + 2**-8) if",
        "norms if",
        _rules("contribution_is_at_most_c_in_bf16_whatever_the_norm_is_rounded_to"),
    ),
    Mutation(
        "outer products measured one by one", 3, LAYERS,
        "inner.sum(dim=(1, 2))",
        "inner.diagonal(dim1=1, dim2=2).sum(dim=1)",
        _rules("outer_products_are_clipped_like_their_matrices"),
    ),
    Mutation(
        "outer products not clipped", 3, GRADIENTS,
        "gradient.weighted_sum(weights)",
        "gradient.weighted_sum(torch.ones_like(weights))",
        _rules("outer_products_are_clipped_like_their_matrices"),
    ),
    Mutation(
        "rounding of cancelling outer products forgotten", 3, LAYERS,
        " + 2**-20 * lengths.prod(dim=0).sum(dim=1)",
        "",
        _rules("contribution_is_at_most_c_where_outer_products_cancel"),
    ),
    Mutation(
        "non-finite outer product let through", 3, GRADIENTS,
        "if keep is not None:",
        "if False:",
        _rules("non_finite_outer_product_counts_as_zero"),
    ),
    Mutation(
        "non-finite let through", 3, GRADIENTS,
        "finite = torch.isfinite(norms)",
        "finite = torch.ones_like(norms, dtype=torch.bool)",
        _rules("non_finite_contribution_counts_as_zero"),
    ),
    Mutation(
        "rows not checked", 3, GRADIENTS,
        "if seen != expected or len(output) != expected:",
        "if False:",
        _gradients("layer_on_something_shared_by_the_batch_is_refused"),
    ),
    Mutation(
        "bf16 accumulation of the clipped sum", 3, STEP,
        "total[name] += gradient",
        "total[name] = (total[name].bfloat16() + gradient.bfloat16()).float()",
        ONE_IMAGE + BRUTE_FORCE,
    ),
    # Rule 4: noise once, fixed divisor.
    Mutation(
        "noise without C", 4, PLAN,
        "scale = self.noise_multiplier * self.clipping_norm",
        "scale = self.noise_multiplier",
        NOISE,
    ),
    Mutation(
        "noise halved", 4, PLAN,
        "scale = self.noise_multiplier * self.clipping_norm",
        "scale = 0.5 * self.noise_multiplier * self.clipping_norm",
        NOISE,
    ),
    Mutation(
        "noise scaled by the drawn batch size", 4, STEP,
        "noisy = self.plan.privatise(total,",
        'drawn = self.plan.noise_multiplier * len(batch) / self.plan.batch_size\n'
        '        noisy = type(self.plan)(**{**vars(self.plan), "noise_multiplier": drawn}).privatise(total,',
        EMPTY,
    ),
    Mutation(
        "noise per process", 4, STEP,
        "total = self.compute.sum_over_processes(total)",
        "total = {n: t + torch.randn_like(t) * self.plan.noise_multiplier for n, t in self.compute.sum_over_processes(total).items()}",
        EMPTY + _rules("processes_share_one_batch_and_one_noise"),
    ),
    Mutation(
        "one noise for every parameter", 4, PLAN,
        "        for name in sorted(total):\n",
        '        for name in sorted(total):\n            rng = key.substream("gradient_noise", attempt=attempt, step=step)\n',
        _rules("noise_is_independent_between_parameters_and_steps"),
    ),
    Mutation(
        "divided by the drawn size", 4, STEP,
        "noisy = self.plan.privatise(total,",
        "total = {n: t * self.plan.batch_size / max(1, len(batch)) for n, t in total.items()}\n        noisy = self.plan.privatise(total,",
        _rules("divisor_is_fixed_whatever_was_drawn"),
    ),
    # Rules 3, 4 and 8 under privacy.secure_noise.
    Mutation(
        "secure sums rounded up", 3, GRADIENTS,
        "block.trunc_()",
        "block.round_()",
        _secure("truncation_is_toward_zero", "truncated_contribution_is_at_most_c_for_any_magnitude"),
    ),
    Mutation(
        "padding of secure chunks counted", 3, GRADIENTS,
        "device=scale.device) < examples",
        "device=scale.device) >= 0",
        _secure("non_finite_and_padding_count_as_zero"),
    ),
    Mutation(
        "secure noise halved", 4, PLAN,
        "Grid.of(self.noise_multiplier,",
        "Grid.of(0.5 * self.noise_multiplier,",
        _secure("noise_has_its_deviation_and_the_divisor_is_fixed"),
    ),
    Mutation(
        "secure noise rounded carelessly", 4, "dpsyngen/privacy/secure_noise.py",
        "<= 0.5 - slack * 2.0**exponent",
        "<= 0.5",
        _secure("rounded_gaussian_is_exact_on_chosen_bits"),
    ),
    Mutation(
        "secure stream ignores the step", 8, RANDOMNESS,
        '{step}/{chunk}".encode()\n        return SecureStream',
        '{chunk}".encode()\n        return SecureStream',
        _secure("secure_streams_differ_by_every_part_of_their_name_and_extend_on_the_side"),
    ),
    # Rule 5: DP class means, in one plan with DP-SGD.
    Mutation(
        "class means divided by exact counts", 5, MEANS,
        ", noisy_sum(counts, self.noise_multiplier, rng, grid), shape\n",
        ", counts, shape\n",
        NOISY_COUNTS,
    ),
    Mutation(
        "class means of exact sums", 5, MEANS,
        "return noisy_sum(sums, self.noise_multiplier, rng, grid),",
        "return sums,",
        _rules("class_means_noise_reaches_the_sums"),
    ),
    Mutation(
        "class means contribution unclipped", 5, MEANS,
        "np.maximum(norms, self.radius)",
        "self.radius",
        _rules("class_means_contribution_has_norm_at_most_one"),
    ),
    Mutation(
        "class means without a floor", 5, MEANS,
        "np.maximum(counts / self.count_weight, self.count_floor)",
        "(counts / self.count_weight)",
        _rules("class_means_divide_by_noisy_counts_and_floor_them"),
    ),
    Mutation(
        "class means not paid for", 5, PLAN,
        "        if self.class_means is None:\n            return (*self.before, sgd)\n",
        "        if True:\n            return (*self.before, sgd)\n",
        PRICE + _plan("class_means_are_in_the_price"),
    ),
    Mutation(
        "only one round of the prototypes paid for", 5, PLAN,
        "(self.class_means.rounds * means_releases)",
        "means_releases",
        _prototypes("every_round_is_in_the_price"),
    ),
    Mutation(
        "covariance not paid for", 5, PLAN,
        "beside += (GaussianMechanism(self.covariance.noise_multiplier, name=\"DP covariance\"),)",
        "pass",
        _covariance("it_is_in_the_price"),
    ),
    Mutation(
        "covariance contribution unclipped", 5, COVARIANCE,
        "z / np.maximum(norms, self.radius)",
        "z / self.radius",
        _covariance("an_image_moves_the_sum_by_at_most_one"),
    ),
    Mutation(
        "covariance of exact sums", 5, COVARIANCE,
        "noisy_sum(summed[\"vector\"].numpy(), self.noise_multiplier, rng, grid)",
        "noisy_sum(summed[\"vector\"].numpy(), 0.0, rng, grid)",
        _covariance("the_sum_has_noise"),
    ),
    Mutation(
        "teacher not paid for", 5, PLAN,
        "beside += (GaussianMechanism(self.teacher.noise_multiplier, name=\"DP teacher\", steps=self.teacher.steps),)",
        "pass",
        _teacher("it_is_in_the_price"),
    ),
    Mutation(
        "only one step of the teacher paid for", 5, PLAN,
        "name=\"DP teacher\", steps=self.teacher.steps)",
        "name=\"DP teacher\")",
        _teacher("it_is_in_the_price"),
    ),
    Mutation(
        "teacher's gradients unclipped", 5, TEACHER,
        "residuals / np.maximum(norms, 1.0)",
        "residuals",
        _teacher("an_image_moves_each_sum_by_at_most_one"),
    ),
    Mutation(
        "teacher's non-finite features let through", 5, TEACHER,
        "np.where(np.isfinite(exact).all(axis=1, keepdims=True), exact, 0.0)",
        "exact",
        _teacher("an_image_moves_each_sum_by_at_most_one"),
    ),
    Mutation(
        "teacher of exact gradients", 5, TEACHER,
        "self.noise_multiplier, rng, grid) / self.expected_size",
        "0.0, rng, grid) / self.expected_size",
        _teacher("each_step_has_noise_of_its_own"),
    ),
    Mutation(
        "teacher divided by the true size", 5, TEACHER,
        "rng, grid) / self.expected_size",
        "rng, grid) / max(1.0, seen)",
        _teacher("the_sum_is_divided_by_the_declared_size"),
    ),
    Mutation(
        "prototypes see each image in all parts of its class", 5, MEANS,
        "sums[which] += scaled[block == which].sum(axis=0)",
        "sums[which] += scaled[block // self.prototypes == which // self.prototypes].sum(axis=0)",
        _prototypes("each_round_moves_by_at_most_one_whoever_is_left_out"),
    ),
    Mutation(
        "plan changed after pricing", 5, PLAN,
        "@dataclass(frozen=True)\n",
        "@dataclass(unsafe_hash=True)\n",
        _plan("plan_is_frozen"),
    ),
    # Rule 6: accounting.
    Mutation(
        "half the steps paid for", 6, PLAN,
        "SubsampledGaussianMechanism(self.noise_multiplier, self.sampling_rate, steps,",
        "SubsampledGaussianMechanism(self.noise_multiplier, self.sampling_rate, steps // 2,",
        PRICE,
    ),
    Mutation(
        "wrong sampling rate paid for", 6, ACCOUNTING,
        "PoissonSampledDpEvent(self.sampling_rate,",
        "PoissonSampledDpEvent(0.9 * self.sampling_rate,",
        _plan("prv_accountant_agrees"),
    ),
    Mutation(
        "noise below the target", 6, ACCOUNTING,
        "    return high\n",
        "    return low\n",
        _plan("smallest_noise_never_exceeds_the_target"),
    ),
    Mutation(
        "epsilon above the target accepted", 6, ACCOUNTING,
        "<= spent <= target:",
        "<= spent <= 1.01 * target:",
        _plan("smallest_noise_never_exceeds_the_target", "calibration_comes_within_half_a_percent_and_never_above"),
    ),
    Mutation(
        "rounding errors not paid for", 6, ACCOUNTING,
        "delta - ROUNDING * compositions",
        "delta",
        _rules("claim_is_void_where_rounding_errors_could_be_all_of_delta"),
    ),
    # Rule 7: nothing unpaid leaves.
    Mutation(
        "private loss always logged", 7, STEP,
        "_Diagnostics() if self.config.tracking.log_private_diagnostics_without_dp else None",
        "_Diagnostics()",
        _rules("private_step_returns_nothing_unless_asked"),
    ),
    Mutation(
        "private points tracked as they come", 7, TRACKING,
        'if phase == "synthetic" or self.live_without_dp:',
        "if True:",
        ("test_tracking.py::test_private_points_wait_for_the_end_of_their_phase",),
    ),
    # Rule 8: the key.
    Mutation(
        "key sent to trackers", 8, TRACKING,
        "asdict(config.without_secrets)",
        "asdict(config)",
        ("test_tracking.py::test_a_tracker_gets_the_lines_of_the_metrics_and_no_secret",),
    ),
    Mutation(
        "key shared by two runs", 8, RANDOMNESS,
        "return cls(secrets.token_bytes(32))",
        "return cls(bytes(32))",
        _rules("fresh_keys_are_never_shared_and_never_shown"),
    ),
    Mutation(
        "key readable by others", 8, RANDOMNESS,
        "os.O_EXCL, 0o600)",
        "os.O_EXCL, 0o644)",
        _rules("key_file_is_secret_and_destroyed"),
    ),
    Mutation(
        "key not destroyed", 8, RANDOMNESS,
        "            os.fsync(file.fileno())\n        path.unlink()\n",
        "            os.fsync(file.fileno())\n",
        _rules("key_file_is_secret_and_destroyed"),
    ),
    Mutation(
        "key not overwritten", 8, RANDOMNESS,
        "file.write(bytes(path.stat().st_size))",
        "file.write(b'')",
        _rules("destroyed_key_is_overwritten_first"),
    ),
    Mutation(
        "substream ignores the step", 8, RANDOMNESS,
        '{step}/{chunk}".encode()\n        derived',
        '{chunk}".encode()\n        derived',
        _rules("substreams_differ_by_every_part_of_their_name_and_by_key"),
    ),
    Mutation(
        "draws of a new attempt repeated", 8, PLAN,
        'stream("draws", attempt=attempt,',
        'stream("draws",',
        _rules("new_attempt_draws_everything_afresh"),
    ),
    Mutation(
        "noise of a new attempt repeated", 8, PLAN,
        'key.substream("gradient_noise", attempt=attempt,',
        'key.substream("gradient_noise",',
        _rules("new_attempt_draws_everything_afresh"),
    ),
    Mutation(
        "batch of a new attempt repeated", 8, PLAN,
        'key.substream("batch", attempt=attempt,',
        'key.substream("batch",',
        _rules("new_attempt_draws_everything_afresh"),
    ),
    # Rule 9: the journal.
    Mutation(
        "journal after the step", 9, STEP,
        "        self.journal.begin(step)\n        batch",
        "        batch",
        _rules("step_is_journalled_before_it_is_computed"),
    ),
    Mutation(
        "replay free in any case", 9, JOURNAL,
        "if self.fingerprint != fingerprint or plan != self.plan or not own:",
        "if self.attempt < 0:",
        _rules("replay_is_free_only_with_the_same_fingerprint"),
    ),
    Mutation(
        "attempt reused on other weights", 9, JOURNAL,
        " or weights == self.weights\n",
        " or computed_by is None\n",
        _attempts("a_lost_synthetic_phase_is_repeated_free_if_it_ends_in_the_same_weights"),
    ),
    Mutation(
        "attempt reused on the weights of another", 9, JOURNAL,
        "own = computed_by == self.attempt or",
        "own = computed_by is not None or",
        (
            *_rules("attempt_never_replays_on_weights_that_are_not_its_own"),
            *_attempts("a_checkpoint_of_another_attempt_is_not_gone_on_with", "an_attempt_is_left_when_its_first_central_steps_are_lost"),
        ),
    ),
    Mutation(
        "optimiser and average left out of the digest", 9, "dpsyngen/progress.py",
        "Checkpoint(self._restored | self._weights(), self._position)",
        "Checkpoint(self._weights(), self._position)",
        _attempts("a_digest_tells_all_that_the_next_step_starts_from"),
    ),
    Mutation(
        "digests of other processes left out", 9, "dpsyngen/compute.py",
        "rows[self.rank] = own",
        "rows[0] = own * int(self.is_main)",
        _attempts("processes_agree_on_a_digest_that_depends_on_each"),
    ),
    Mutation(
        "line cut short left in the journal", 9, JOURNAL,
        "        os.truncate(path, len(complete))\n",
        "        pass\n",
        _resume("a_disk_that_is_full_for_the_journal_announces_nothing"),
    ),
    Mutation(
        "changed checkpoint accepted", 9, CHECKPOINT,
        "if written[\"sha256\"] != _digest(content, written[\"state\"]):",
        "if False:",
        _resume("damaged_checkpoints_are_not_among_those_kept"),
    ),
    Mutation(
        "damaged checkpoint left to come back", 9, CHECKPOINT,
        "            if int(path.name) > number:\n",
        "            if False:\n",
        _resume("damaged_checkpoints_are_not_among_those_kept"),
    ),
    Mutation(
        "ends of uniform draws left out of the fingerprint", 9, LEDGER,
        "config.stages, stages(config), config.hints",
        "config.stages, config.hints",
        _ledger("other_ends_of_uniform_draws_are_charged"),
    ),
    Mutation(
        "lost journal accepted", 9, LEDGER,
        "if plan is not None and (reached > spending.steps",
        "if False and (reached > spending.steps",
        _rules("weights_that_spent_what_no_journal_records_are_refused"),
    ),
    Mutation(
        "steps in vain not charged", 9, LEDGER,
        "affordable - self._spending.steps",
        "planned - reached - self.journal.begun_since(reached)",
        _rules("steps_spent_in_vain_shorten_the_run_and_the_budget_ends_it"),
    ),
    Mutation(
        "journal before privacy.json", 9, JOURNAL,
        "            self.ahead(_added(self.segments[-1][1], what))\n            self._write({\"attempt\": self.attempt, \"step\": what})\n",
        "            self._write({\"attempt\": self.attempt, \"step\": what})\n            self.ahead(self.segments[-1][1])\n",
        _ledger("a_crash_between_privacy_json_and_the_journal_understates_nothing"),
    ),
    Mutation(
        "privacy.json not written ahead", 9, LEDGER,
        "        journal.ahead = ledger._tell\n",
        "",
        _ledger("privacy_json_covers_every_step_before_it_is_announced", "a_long_run_writes_at_twenty_points_and_is_covered_between"),
    ),
    Mutation(
        "privacy.json says less and nobody notices", 9, "dpsyngen/privacy/spent.py",
        'if steps < found["steps_begun"] or understated:',
        "if False:",
        _ledger("auditors_see_what_privacy_json_leaves_out"),
    ),
    Mutation(
        "data left out of the fingerprint", 9, JOURNAL,
        "parts = [data, config,",
        "parts = [config,",
        _ledger("other_data_is_charged"),
    ),
    Mutation(
        "config left out of the fingerprint", 9, JOURNAL,
        "parts = [data, config,",
        "parts = [data,",
        _ledger("another_config_is_charged"),
    ),
    Mutation(
        "code left out of the fingerprint", 9, JOURNAL,
        "code.update(file.read_bytes())",
        "code.update(b'')",
        _ledger("other_code_is_charged"),
    ),
    Mutation(
        "generators left out of the fingerprint", 9, JOURNAL,
        '.rglob("*.py")), *code_files()):',
        '.rglob("*.py")),):',
        ("test_registry.py::test_the_code_of_a_family_is_part_of_the_fingerprint",),
    ),
    Mutation(
        "process count left out of the fingerprint", 9, JOURNAL,
        "kind, str(processes)]",
        "kind]",
        _ledger("another_number_of_processes_is_charged"),
    ),
    Mutation(
        "threads and device left out of the fingerprint", 9, JOURNAL,
        "code_digest(), kind,",
        "code_digest(),",
        _ledger("another_number_of_threads_is_charged", "another_device_kind_is_charged"),
    ),
    Mutation(
        "changed privacy settings accepted", 9, RUN,
        "if not (changed_privacy and name in PRIVACY_SETTINGS)]",
        "if name not in PRIVACY_SETTINGS]",
        _ledger("changed_privacy_settings_are_refused_unless_asked_for"),
    ),
    Mutation(
        "another counted size accepted", 9, CONTINUATION,
        "    if not changed_privacy:\n",
        "    if False:\n",
        _ledger("another_counted_size_is_another_sampling_rate"),
    ),
    Mutation(
        "spending under the old settings forgotten", 9, PLAN,
        "            return (*self.before, sgd)\n",
        "            return (sgd,)\n",
        _ledger("changed_settings_add_up", "full_batches_add_up_as_the_closed_form_says"),
    ),
    Mutation(
        "old spending above the new target accepted", 9, PLAN,
        "        if spent > most:\n            raise InputError",
        "        if spent > most:\n            return replace(plan, noise_multiplier=1000.0)\n            raise InputError",
        _ledger("what_the_new_settings_have_no_room_for_is_refused"),
    ),
    Mutation(
        "timings readable by others", 8, "dpsyngen/progress.py",
        ', private=True)',
        ")",
        _ledger("what_would_undo_the_noise_is_apart_and_closed_to_others"),
    ),
    Mutation(
        "private files left open on resume", 8, RUN,
        "                file.chmod(0o600)\n",
        "                file.exists()\n",
        _ledger("what_would_undo_the_noise_is_apart_and_closed_to_others"),
    ),
    # Rules 6 and 7: a choice among runs is paid for, and shows nothing but the winner.
    Mutation(
        "dearest setting not paid", 6, REPEATS,
        "np.max([",
        "np.min([",
        _repeats("settings_that_differ_cost_the_largest_divergence_at_each_order"),
    ),
    Mutation(
        "number of runs not paid", 6, REPEATS,
        "_OneOfDpEvent(events), repeats.mean,",
        "_OneOfDpEvent(events), 1,",
        _repeats("price_bounds_what_selection_gives_away_exactly"),
    ),
    Mutation(
        "more runs drawn than paid for", 6, REPEATS,
        "* (1 - 1e-9)",
        "* 1.05",
        _repeats("number_of_runs_follows_the_distribution_that_is_paid_for"),
    ),
    Mutation(
        "score not paid", 6, TERMS,
        "spent = {plan.mechanisms(plan.steps) + score.mechanisms for",
        "spent = {plan.mechanisms(plan.steps) for",
        _select("price_is_paid_by_every_setting_and_covers_them_all"),
    ),
    Mutation(
        "winner states the price of one run", 6, TERMS,
        '"epsilon": self.epsilon,\n            "target',
        '"epsilon": self.epsilon_alone,\n            "target',
        _select("winner_leaves_at_the_price_of_the_selection_once_all_runs_have_ended"),
    ),
    Mutation(
        "an image counts twice in the score", 6, SCORE,
        "return right * math.trunc(",
        "return right * 2 * math.trunc(",
        _select("noise_on_the_score_costs_and_counts_each_image_once"),
    ),
    Mutation(
        "private score for free", 7, SCORE,
        "elif not (images_are_public or config.data.public):",
        "elif False:",
        _select("what_would_not_be_paid_for_is_refused"),
    ),
    Mutation(
        "drawn again when the draw is lost", 7, SELECT,
        "        if not drawn.is_file():\n",
        "        if not drawn.is_file():\n            public.unlink()\n            return _draws(directory, terms)\n        if False:\n",
        _select("what_was_drawn_is_secret_and_stays"),
    ),
    Mutation(
        "draws readable by others", 7, SELECT,
        "mode=0o600)",
        "mode=0o644)",
        _select("what_was_drawn_is_secret_and_stays"),
    ),
    Mutation(
        "losers kept", 7, SELECT,
        "            shutil.rmtree(private)\n",
        "            pass\n",
        _select("winner_leaves_at_the_price_of_the_selection_once_all_runs_have_ended"),
    ),
    Mutation(
        "losers can be released", 7, SELECT,
        '        write_file(job.run.candidate, f"{_WITHHELD}\\n")\n',
        "        job.run.candidate.exists()\n",
        _select("no_run_that_is_chosen_from_can_be_mistaken_for_a_release"),
    ),
    Mutation(
        "failed runs dropped", 7, SELECT,
        "        raise SystemExit(1)\n",
        "        return\n",
        _select("winner_leaves_at_the_price_of_the_selection_once_all_runs_have_ended"),
    ),
    Mutation(
        "overspent run chosen", 6, SELECT,
        "if job.failure is None and not _is_within",
        "if False and not _is_within",
        _select("run_that_spent_more_than_was_paid_for_is_run_anew"),
    ),
    Mutation(
        "nonprivate stages under a guarantee", 7, CONFIG,
        'return not self._has_stages_of("nonprivate")',
        'return self.stages.variant != "nonprivate"',
        _custom("nonprivate_stages_void_the_guarantee"),
    ),
    # Rule 10: no layer mixes examples.
    Mutation(
        "BatchNorm accepted", 10, SAFETY,
        'if isinstance(layer, _MIXING) or getattr(layer, "track_running_stats", False):',
        "if False:",
        _rules("mixing_layers_are_refused"),
    ),
    Mutation(
        "no probe for mixing", 10, SAFETY,
        "if not torch.allclose(",
        "if False and not torch.allclose(",
        _rules("mixing_layers_are_refused"),
    ),
    # Rule 11: public gradients are added last, and know nothing of the private images.
    Mutation(
        "replay added before normalisation", 11, REPLAY,
        "parameter.grad, factor)",
        "parameter.grad, factor / self.public.config.private.batch_size)",
        ADDED,
    ),
    Mutation(
        "replay clipped together with the private gradient", 11, REPLAY,
        "parameter.grad, factor)\n",
        "parameter.grad, self.weight)\n        torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), self.clipping_norm)\n",
        ADDED,
    ),
    Mutation(
        "replay not clipped", 11, REPLAY,
        "factor = self.weight * self._clip()",
        "factor = self.weight",
        ADDED,
    ),
    Mutation(
        "replay in place of the private gradient", 11, REPLAY,
        "return private + factor * public",
        "return factor * public",
        (*ADDED, *SAME_BITS),
    ),
    Mutation(
        "replay touches the private gradient", 11, REPLAY,
        "        finished = {name: parameter.grad for",
        "        finished = {name: parameter.grad * (1 + 1e-6) for",
        SAME_BITS,
    ),
    Mutation(
        "non-finite public gradient let through", 11, REPLAY,
        ' if norm < float("inf") else 0.0',
        "",
        _replay("a_public_gradient_that_is_not_finite_is_left_out"),
    ),
    Mutation(
        "replay fed with private images", 11, PHASES,
        "ReplayStep(step, replayed(config, networks[0], compute),",
        "ReplayStep(step, OrdinaryStep((Lesson(taught[0], networks[0], nonprivate_batches(dataset, networks[0])),), 7, "
        "config.synthetic, config, compute, True),",
        UNAWARE,
    ),
    Mutation(
        "replay seeded from the private key", 11, PHASES,
        "replayed(config, networks[0], compute)",
        'replayed(__import__("dataclasses").replace(config, seed=ledger.key.secret[0]), networks[0], compute)',
        UNAWARE,
    ),
    Mutation(
        "replay changes the plan", 11, PLAN,
        "config.private_steps(expected_size), config.privacy",
        "config.private_steps(expected_size) + (config.stages.replay > 0), config.privacy",
        _replay("replay_changes_no_number_of_the_guarantee"),
    ),
    Mutation(
        "replay repeats the synthetic phase", 11, PHASES,
        'before=steps + _steps(config, "central"), images_before=steps * settings.batch_size,',
        "",
        _replay("replay_goes_on_in_the_public_sequence_where_the_synthetic_phase_ends"),
    ),
    Mutation(
        "central phase fed with private images", 11, TRAINING,
        "        run_phase(prepared.central, prepared.central.steps,",
        "        from dpsyngen.ordinary_step import nonprivate_batches\n"
        "        for lesson in prepared.central.gradient.lessons:\n"
        '            lesson.__dict__["batches"] = nonprivate_batches(prepared.dataset, denoiser)\n'
        "        run_phase(prepared.central, prepared.central.steps,",
        _central("stopped_in_the_middle_it_ends_in_the_same_bytes_and_on_other_images_and_key_as_well"),
    ),
    Mutation(
        "central phase changes the plan", 11, PLAN,
        "config.private_steps(expected_size), config.privacy",
        "config.private_steps(expected_size) + config.central.planned_steps(expected_size), config.privacy",
        _central("it_changes_no_number_of_the_guarantee"),
    ),
)  # fmt: skip
