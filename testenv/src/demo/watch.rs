//! The object as it changes: `kubectl get -w` twice, as a table for the terminal and as JSON for the demo's own
//! decisions. Every wait is for something the object says, with a deadline.

use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::Value;
use tokio::time::Instant;

use crate::commands::{Commands, Running};
use crate::terminal;

const STEP: Duration = Duration::from_millis(50);
/// For the table to say what the object says already.
const TABLE_DEADLINE: Duration = Duration::from_secs(2);

const TABLE: &str = "kubectl get imagemirror -n monitoring datadog -w";
const OBJECTS: &str = "kubectl get imagemirror -n monitoring datadog -w -o json";

/// Both watches and what they said last.
pub(super) struct Watch {
    table: Running,
    objects: Running,
    /// The beginning of a row or of an object whose rest has not come yet.
    unfinished_row: String,
    unfinished_object: String,
    row: Vec<String>,
    /// Whether a row was printed since the wait began.
    has_news: bool,
    pub(super) mirror: Value,
}

impl Watch {
    /// Starts to watch; the object must exist.
    pub(super) fn start(commands: &Commands) -> Result<Self> {
        let objects = commands.start(OBJECTS)?;
        commands.announce(TABLE);
        Ok(Self {
            table: commands.start(TABLE)?,
            objects,
            unfinished_row: String::new(),
            unfinished_object: String::new(),
            row: Vec::new(),
            has_news: false,
            mirror: Value::Null,
        })
    }

    /// Shows every change until the object is as `done` says and the table shows that. An error after `deadline`, with
    /// `what` and the object's own words.
    pub(super) async fn until(&mut self, what: &str, deadline: Duration, done: impl Fn(&Value) -> bool) -> Result<()> {
        let end = Instant::now() + deadline;
        self.has_news = false;
        loop {
            self.read_objects()?;
            self.read_table()?;
            if done(&self.mirror) {
                break;
            }
            if Instant::now() >= end {
                let status = &self.mirror["status"];
                bail!(
                    "{what}: not within {} s; the object says: {:#} {:#}",
                    deadline.as_secs(),
                    status["conditions"],
                    status["failures"]
                );
            }
            tokio::time::sleep(STEP).await;
        }
        let end = Instant::now() + TABLE_DEADLINE;
        let shown = [ready(&self.mirror), text(&self.mirror["status"]["synced"])].map(str::to_owned);
        while !(self.has_news && self.row.get(1..3) == Some(&shown)) && Instant::now() < end {
            tokio::time::sleep(STEP).await;
            self.read_table()?;
        }
        Ok(())
    }

    /// Prints the rows whose columns differ from the last one's. Times alone are no news.
    fn read_table(&mut self) -> Result<()> {
        self.unfinished_row += &self.table.news()?;
        while let Some((row, rest)) = self.unfinished_row.split_once('\n') {
            let columns: Vec<String> = row.split_whitespace().take(5).map(str::to_owned).collect();
            if columns != self.row {
                terminal::output(row);
                self.row = columns;
                self.has_news = true;
            }
            self.unfinished_row = rest.to_owned();
        }
        Ok(())
    }

    fn read_objects(&mut self) -> Result<()> {
        self.unfinished_object += &self.objects.news()?;
        let mut stream = serde_json::Deserializer::from_str(&self.unfinished_object).into_iter::<Value>();
        let mut used = 0;
        while let Some(Ok(mirror)) = stream.next() {
            used = stream.byte_offset();
            let progress = &mirror["status"]["progress"];
            if progress.is_object() && *progress != self.mirror["status"]["progress"] {
                terminal::output(&in_words(progress));
            }
            self.mirror = mirror;
        }
        self.unfinished_object.drain(..used);
        Ok(())
    }
}

/// The status of the condition Ready; empty if there is none.
pub(super) fn ready(mirror: &Value) -> &str {
    let conditions = mirror["status"]["conditions"].as_array();
    let ready = conditions.and_then(|conditions| conditions.iter().find(|condition| condition["type"] == "Ready"));
    ready.map(|condition| text(&condition["status"])).unwrap_or_default()
}

/// Whether the run that the annotation's `token` asked for has ended well.
pub(super) fn handled(mirror: &Value, token: &str) -> bool {
    mirror["status"]["lastHandledReconcileAt"] == token && ready(mirror) == "True"
}

fn in_words(progress: &Value) -> String {
    let number = |field: &str| progress[field].as_u64().unwrap_or_default();
    format!(
        "  status.progress: {} of {} MB, {} of {} images",
        terminal::megabytes(number("bytesDone")),
        terminal::megabytes(number("bytesTotal")),
        number("imagesDone"),
        number("imagesTotal"),
    )
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_token_is_handled_once_the_object_names_it_and_is_ready() {
        let mirror = |ready, token| {
            let conditions = json!([{ "type": "Ready", "status": ready }]);
            json!({ "status": { "conditions": conditions, "lastHandledReconcileAt": token } })
        };
        assert!(handled(&mirror("True", "now"), "now"));
        assert!(!handled(&mirror("False", "now"), "now") && !handled(&mirror("True", "before"), "now"));
        assert!(!handled(&Value::Null, "now"));
    }
}
