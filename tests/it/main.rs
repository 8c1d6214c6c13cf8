//! The tests of the whole: the real binary against a real API server and real registries.
//!
//! `make test` runs them; each test owns a namespace, an operator that watches it alone, and a repository prefix, so
//! that all run side by side. Nothing here sleeps to wait for something.

mod api;
mod api_data;
mod audit;
mod bad_input;
mod boundaries;
mod bounds;
mod cases;
mod catalogue;
mod chart;
mod check;
mod clouds;
mod compatibility;
mod credentials;
mod direct;
mod docs;
mod economy;
mod engine;
mod faults;
mod forms;
mod gitops;
mod golden;
mod interrupts;
mod kubernetes;
mod layout;
mod leadership;
mod lifecycle;
mod login;
mod logs;
mod main_job;
mod mutations;
mod packaging;
mod platforms;
mod plugin;
mod process;
mod recording;
mod reference;
mod referrers;
mod secrecy;
mod soak;
mod statuses;
mod supply;
mod support;
mod tags;
mod telemetry;
mod terminal;
#[cfg(feature = "otel")]
mod traces;
mod turns;
mod tutorial;
mod uploads;
mod waiting;
mod walls;
