"""The plans of stages as fields for a terminal."""

from orchestrator.planning.plan import Plan
from orchestrator.stages.planned import StagePlan, WritingPlan
from orchestrator.terminal.render import show_fields, show_plan


def show_stage(plan: StagePlan) -> None:
    """Show what a stage would train, or write."""
    if isinstance(plan, Plan):
        show_plan(plan)
    else:
        show_fields(_writing_fields(plan))


def _writing_fields(plan: WritingPlan) -> dict[str, str]:
    """What a stage would write, at most."""
    columns = ", ".join(plan.columns)
    fields = {
        "job": f"{plan.name}: columns of rows, by {plan.base}",
        "columns": columns,
        "rows": "as many as the stage before it writes",
        "each row": f"{plan.asked} questions, at most {plan.new_tokens:,} tokens written",
    }
    if plan.rows is not None:
        questions = plan.rows * plan.asked
        tokens = plan.rows * plan.new_tokens
        fields["rows"] = f"{plan.rows:,}"
        fields["all rows"] = f"{questions:,} questions, at most {tokens:,} tokens written"
    return fields
