//! What came out: medians, ratios to the best peer, the goals and whether they are met, as Markdown.

use std::fmt::Write;

use crate::measure::Sample;
use crate::peers::Role;
use crate::rounds::{Case, Series};

/// Where ocync, the best peer in time, is not among the peers, a goal in time counts as met within this of the floor.
const OF_THE_FLOOR: f64 = 1.15;
const BEST_PEER: &str = "ocync";

/// One of the things that are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Measure {
    Wall,
    Cpu,
    Memory,
    TargetRequests,
    SourceRequests,
    Requests,
}

impl Measure {
    fn of(self, sample: &Sample) -> f64 {
        match self {
            Self::Wall => sample.wall,
            Self::Cpu => sample.cpu,
            Self::Memory => sample.memory,
            Self::TargetRequests => sample.target_requests,
            Self::SourceRequests => sample.source_requests,
            Self::Requests => sample.target_requests + sample.source_requests,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Wall => "wall",
            Self::Cpu => "CPU",
            Self::Memory => "memory",
            Self::TargetRequests => "target requests",
            Self::SourceRequests => "source requests",
            Self::Requests => "requests, both sides",
        }
    }

    fn show(self, value: f64) -> String {
        match self {
            Self::Wall | Self::Cpu => format!("{value:.2} s"),
            Self::Memory => format!("{value:.1} MiB"),
            Self::TargetRequests | Self::SourceRequests | Self::Requests => format!("{value:.0}"),
        }
    }

    fn is_time(self) -> bool {
        matches!(self, Self::Wall | Self::Cpu)
    }
}

/// What a value is held against.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Limit {
    /// A part of what the best peer takes.
    OfBest(f64),
    AtMost(f64),
}

struct Goal {
    case: Case,
    phase: Phase,
    measure: Measure,
    limit: Limit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Fresh,
    NoOp,
}

const GOALS: [Goal; 15] = {
    use Case::{W1, W1Far, W2, W2Far};
    use Limit::{AtMost, OfBest};
    use Measure::{Cpu, Memory, Requests, SourceRequests, TargetRequests, Wall};
    use Phase::{Fresh, NoOp};
    const fn goal(case: Case, phase: Phase, measure: Measure, limit: Limit) -> Goal {
        Goal { case, phase, measure, limit }
    }
    [
        goal(W1, Fresh, Wall, OfBest(0.80)),
        goal(W1, Fresh, Cpu, OfBest(0.95)),
        goal(W1, Fresh, Memory, AtMost(20.0)),
        goal(W1, Fresh, TargetRequests, AtMost(96.0)),
        goal(W1, Fresh, SourceRequests, AtMost(51.0)),
        goal(W2, Fresh, Wall, OfBest(0.85)),
        goal(W2, Fresh, Cpu, OfBest(0.50)),
        goal(W2, Fresh, Memory, AtMost(24.0)),
        goal(W2, Fresh, TargetRequests, AtMost(5660.0)),
        goal(W2, Fresh, SourceRequests, AtMost(3580.0)),
        goal(W2, NoOp, Requests, AtMost(1020.0)),
        goal(W2, NoOp, Wall, OfBest(1.0)),
        goal(W1Far, Fresh, Wall, OfBest(0.60)),
        goal(W2Far, Fresh, Wall, OfBest(0.60)),
        goal(W2Far, NoOp, Wall, OfBest(0.60)),
    ]
};

/// What a client took in one case and phase: medians, or what it failed of.
struct Row<'a> {
    name: &'a str,
    role: Role,
    outcome: Result<Sample, String>,
}

/// Everything as Markdown: a table for each case and phase, then the goals.
pub(crate) fn tables(series: &[Series]) -> String {
    let mut text = String::new();
    let mut goals = String::new();
    for case in Case::ALL {
        for phase in [Phase::Fresh, Phase::NoOp] {
            let rows: Vec<Row> = series.iter().filter(|series| series.case == case).map(|of| row(of, phase)).collect();
            if !rows.is_empty() {
                table(&mut text, &title(case, phase), &rows);
                for goal in GOALS.iter().filter(|goal| (goal.case, goal.phase) == (case, phase)) {
                    goals.extend(goal_line(goal, &rows));
                }
            }
        }
    }
    // Writing to a string cannot fail, here and below.
    let _ = writeln!(text, "## Goals\n");
    let _ = writeln!(text, "| run | measure | goal | imagemirror | of the best peer | of the floor | met |");
    let _ = writeln!(text, "|---|---|---|---:|---:|---:|---|");
    text + &goals
}

fn title(case: Case, phase: Phase) -> String {
    match phase {
        Phase::Fresh => format!("{}, empty target", case.title()),
        Phase::NoOp => format!("{}, nothing to do", case.title()),
    }
}

fn row(series: &Series, phase: Phase) -> Row<'_> {
    let runs = match phase {
        Phase::Fresh => &series.fresh,
        Phase::NoOp => &series.no_op,
    };
    let good: Vec<&Sample> = runs.iter().filter_map(|run| run.as_ref().ok()).collect();
    let outcome = match runs.iter().find_map(|run| run.as_ref().err()) {
        None => Ok(medians(&good)),
        Some(error) => Err(format!("failed in {} of {} runs: {error}", runs.len() - good.len(), runs.len())),
    };
    Row { name: &series.client.name, role: series.client.role(), outcome }
}

fn medians(samples: &[&Sample]) -> Sample {
    let of = |measure: fn(&Sample) -> f64| median(samples.iter().map(|sample| measure(sample)).collect());
    Sample {
        wall: of(|sample| sample.wall),
        cpu: of(|sample| sample.cpu),
        registries_cpu: of(|sample| sample.registries_cpu),
        memory: of(|sample| sample.memory),
        target_requests: of(|sample| sample.target_requests),
        source_requests: of(|sample| sample.source_requests),
    }
}

/// The value in the middle, or between the two there; 0 of none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.get(middle) {
        None => 0.0,
        Some(value) if values.len() % 2 == 1 => *value,
        Some(value) => f64::midpoint(values[middle - 1], *value),
    }
}

/// The least that a peer took.
fn best(rows: &[Row], measure: Measure) -> Option<f64> {
    let peers = rows.iter().filter(|row| row.role == Role::Peer);
    peers.filter_map(|row| row.outcome.as_ref().ok()).map(|sample| measure.of(sample)).min_by(f64::total_cmp)
}

fn value_of(rows: &[Row], role: Role, measure: Measure) -> Option<f64> {
    let row = rows.iter().find(|row| row.role == role)?;
    row.outcome.as_ref().ok().map(|sample| measure.of(sample))
}

fn table(text: &mut String, title: &str, rows: &[Row]) {
    let _ = writeln!(text, "## {title}\n");
    let _ = writeln!(
        text,
        "| | wall s | of the best peer | CPU s | of the best peer | registries' CPU s | peak MiB | target requests | source requests |"
    );
    let _ = writeln!(text, "|---|---:|---:|---:|---:|---:|---:|---:|---:|");
    for row in rows {
        let sample = match &row.outcome {
            Ok(sample) => sample,
            Err(error) => {
                let error = error.replace('|', "\\|").replace(['\n', '\r'], " ");
                let _ = writeln!(text, "| {} | {error} | | | | | | | |", row.name);
                continue;
            }
        };
        let of_best = |measure: Measure| ratio(measure.of(sample), best(rows, measure));
        let _ = writeln!(
            text,
            "| {} | {:.2} | {} | {:.2} | {} | {:.2} | {:.1} | {:.0} | {:.0} |",
            row.name,
            sample.wall,
            of_best(Measure::Wall),
            sample.cpu,
            of_best(Measure::Cpu),
            sample.registries_cpu,
            sample.memory,
            sample.target_requests,
            sample.source_requests,
        );
    }
    let _ = writeln!(text);
}

fn ratio(value: f64, of: Option<f64>) -> String {
    of.filter(|of| *of > 0.0).map_or_else(|| "–".to_owned(), |of| format!("{:.2}", value / of))
}

/// A line of the table of goals; none where ImageMirror did not run.
fn goal_line(goal: &Goal, rows: &[Row]) -> Option<String> {
    rows.iter().find(|row| row.role == Role::Ours)?;
    let Goal { measure, limit, .. } = goal;
    let ours = value_of(rows, Role::Ours, *measure);
    let (best, floor) = (best(rows, *measure), value_of(rows, Role::Floor, *measure));
    let wanted = match limit {
        Limit::OfBest(part) => format!("≤ {part:.2} × best peer"),
        Limit::AtMost(most) => format!("≤ {}", measure.show(*most)),
    };
    let met = match ours {
        None => "no: it failed".to_owned(),
        Some(ours) => {
            let has_best = rows.iter().any(|row| row.name == BEST_PEER);
            verdict(*measure, *limit, ours, best, floor.filter(|_| !has_best))
        }
    };
    let shown = ours.map_or_else(|| "–".to_owned(), |ours| measure.show(ours));
    let against = |of| ours.map_or_else(|| "–".to_owned(), |ours| ratio(ours, of));
    let (title, name) = (title(goal.case, goal.phase), measure.name());
    Some(format!("| {title} | {name} | {wanted} | {shown} | {} | {} | {met} |\n", against(best), against(floor)))
}

/// Whether a goal is met; `floor` where it may count.
fn verdict(measure: Measure, limit: Limit, ours: f64, best: Option<f64>, floor: Option<f64>) -> String {
    let most = match limit {
        Limit::AtMost(most) => Some(most),
        Limit::OfBest(part) => best.map(|best| best * part),
    };
    let at_floor = measure.is_time() && floor.is_some_and(|floor| ours <= floor * OF_THE_FLOOR);
    match most {
        Some(most) if ours <= most => "yes".to_owned(),
        _ if at_floor => format!("yes: within {OF_THE_FLOOR} × floor"),
        Some(most) => format!("**no**: {} too much", measure.show(ours - most)),
        None => "no peer to compare with".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(name: &str, role: Role, wall: f64, requests: f64) -> Row<'_> {
        let sample = Sample { wall, cpu: wall, target_requests: requests, ..Sample::default() };
        Row { name, role, outcome: Ok(sample) }
    }

    fn failed(name: &str) -> Row<'_> {
        Row { name, role: Role::Peer, outcome: Err("failed in 1 of 2 runs: a | b".to_owned()) }
    }

    #[test]
    fn the_median_of_an_even_number_is_between_the_two_in_the_middle() {
        assert!((median(vec![3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(vec![4.0, 1.0, 3.0, 2.0]) - 2.5).abs() < 1e-9);
        assert!(median(Vec::new()).abs() < 1e-9);
    }

    #[test]
    fn the_best_peer_is_neither_the_floor_nor_us_nor_one_that_failed() {
        let rows = [
            peer("floor", Role::Floor, 1.0, 1.0),
            peer("imagemirror", Role::Ours, 1.2, 1.0),
            peer("crane", Role::Peer, 3.0, 1.0),
            peer("regsync", Role::Peer, 2.0, 1.0),
            failed("skopeo"),
        ];
        assert_eq!(best(&rows, Measure::Wall), Some(2.0));
        let mut text = String::new();
        table(&mut text, "W1", &rows);
        assert!(text.contains("| imagemirror | 1.20 | 0.60 | 1.20 | 0.60 |"), "{text}");
        assert!(text.contains("| skopeo | failed in 1 of 2 runs: a \\| b |"), "{text}");
    }

    #[test]
    fn a_goal_in_time_is_met_by_the_part_of_the_best_or_near_the_floor() {
        let (wall, part) = (Measure::Wall, Limit::OfBest(0.8));
        assert_eq!(verdict(wall, part, 1.6, Some(2.0), None), "yes");
        assert_eq!(verdict(wall, part, 1.7, Some(2.0), Some(1.5)), "yes: within 1.15 × floor");
        assert_eq!(verdict(wall, part, 1.7, Some(2.0), Some(1.4)), "**no**: 0.10 s too much");
        assert_eq!(verdict(wall, part, 1.7, Some(2.0), None), "**no**: 0.10 s too much");
        assert_eq!(verdict(wall, part, 1.7, None, None), "no peer to compare with");
    }

    #[test]
    fn requests_are_counted_against_the_number_alone() {
        let most = Limit::AtMost(96.0);
        assert_eq!(verdict(Measure::TargetRequests, most, 96.0, Some(1.0), None), "yes");
        assert_eq!(verdict(Measure::TargetRequests, most, 97.0, Some(190.0), Some(96.0)), "**no**: 1 too much");
    }

    #[test]
    fn with_the_best_peer_among_the_peers_the_floor_does_not_count() {
        let goal = Goal { case: Case::W1, phase: Phase::Fresh, measure: Measure::Wall, limit: Limit::OfBest(0.8) };
        let floor = || peer("floor", Role::Floor, 1.0, 1.0);
        let ours = || peer("imagemirror", Role::Ours, 1.1, 1.0);
        let without = goal_line(&goal, &[floor(), ours(), peer("crane", Role::Peer, 1.2, 1.0)]).unwrap();
        assert!(without.ends_with("| 1.10 s | 0.92 | 1.10 | yes: within 1.15 × floor |\n"), "{without}");
        let with = goal_line(&goal, &[floor(), ours(), peer("ocync", Role::Peer, 1.2, 1.0)]).unwrap();
        assert!(with.ends_with("| **no**: 0.14 s too much |\n"), "{with}");
    }
}
