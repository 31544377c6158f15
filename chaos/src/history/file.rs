//! The history on disk: [`Recorder`] writes lines in the order of their times, [`Reader`] reads them back.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use super::{Line, Micros, Record, VERSION};

/// Bytes that wait for the disk.
const BUFFER_BYTES: usize = 1 << 20;

/// Why a history cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    /// The file.
    #[error("{path}: {error}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// A line is none of this version's.
    #[error("{path}, line {line}: {error}. Is it a history, and of this version of chaos?")]
    Line {
        /// Which.
        path: PathBuf,
        /// Counted from 1.
        line: u64,
        /// Why.
        error: String,
    },
    /// The last line is missing.
    #[error(
        "{path} was cut short after {lines} lines: the run was interrupted, or the disk was full. Such a history proves nothing; run its seed again"
    )]
    CutShort {
        /// Which.
        path: PathBuf,
        /// How many there are.
        lines: u64,
    },
    /// Another version.
    #[error(
        "{path} was written by version {found} of the history format, this program reads {VERSION}: check it with the chaos of its commit"
    )]
    Version {
        /// Which.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
}

/// Writes a history. Cheap to clone; each record is stamped under one lock, so the file is ordered by time.
#[derive(Clone, Debug)]
pub struct Recorder(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    start: Instant,
    wall: i64,
    path: PathBuf,
    file: Mutex<Sink>,
}

#[derive(Debug)]
struct Sink {
    writer: BufWriter<File>,
    lines: u64,
    failed: Option<std::io::Error>,
}

impl Recorder {
    /// Begins a history; the run's clock starts now.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn create(path: &Path) -> Result<Self, HistoryError> {
        let file = File::create(path).map_err(|error| HistoryError::File { path: path.to_owned(), error })?;
        let writer = BufWriter::with_capacity(BUFFER_BYTES, file);
        let sink = Sink { writer, lines: 0, failed: None };
        let wall = chrono::Utc::now().timestamp_micros();
        Ok(Self(Arc::new(Inner { start: Instant::now(), wall, path: path.to_owned(), file: Mutex::new(sink) })))
    }

    /// The run's clock.
    #[must_use]
    pub fn now(&self) -> Micros {
        u64::try_from(self.0.start.elapsed().as_micros()).unwrap_or(Micros::MAX)
    }

    /// When the run's clock stood at 0.
    #[must_use]
    pub fn start(&self) -> Instant {
        self.0.start
    }

    /// Wall clock when the run's clock stood at 0, microseconds of the Unix epoch.
    #[must_use]
    pub fn wall(&self) -> i64 {
        self.0.wall
    }

    /// Adds a record, stamped now, and returns the stamp. A disk that fails is reported by [`finish`](Self::finish).
    pub fn record(&self, record: Record) -> Micros {
        let mut sink = self.0.file.lock();
        let t = self.now();
        if sink.failed.is_none()
            && let Err(error) = sink.write(&Line(t, record))
        {
            sink.failed = Some(error);
        }
        t
    }

    /// Adds the last line and writes everything out. Records that come later are no part of the history.
    ///
    /// # Errors
    /// The disk failed, now or before.
    pub fn finish(&self) -> Result<u64, HistoryError> {
        let mut sink = self.0.file.lock();
        let fail = |error| HistoryError::File { path: self.0.path.clone(), error };
        if let Some(error) = sink.failed.take() {
            return Err(fail(error));
        }
        let lines = sink.lines;
        sink.write(&Line(self.now(), Record::Done { lines })).map_err(fail)?;
        sink.writer.flush().map_err(fail)?;
        Ok(lines)
    }
}

impl Sink {
    fn write(&mut self, line: &Line) -> std::io::Result<()> {
        serde_json::to_writer(&mut self.writer, line)?;
        self.writer.write_all(b"\n")?;
        self.lines += 1;
        Ok(())
    }
}

/// Reads a history line by line.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    lines: std::io::Lines<BufReader<File>>,
    read: u64,
    done: bool,
}

impl Reader {
    /// Opens a history.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open(path: &Path) -> Result<Self, HistoryError> {
        let file = File::open(path).map_err(|error| HistoryError::File { path: path.to_owned(), error })?;
        let lines = BufReader::with_capacity(BUFFER_BYTES, file).lines();
        Ok(Self { path: path.to_owned(), lines, read: 0, done: false })
    }

    fn next_line(&mut self) -> Result<Option<Line>, HistoryError> {
        if self.done {
            return Ok(None);
        }
        let cut_short = HistoryError::CutShort { path: self.path.clone(), lines: self.read };
        let Some(text) = self.lines.next() else { return Err(cut_short) };
        let text = text.map_err(|error| HistoryError::File { path: self.path.clone(), error })?;
        let line: Line = match serde_json::from_str(&text) {
            Ok(line) => line,
            // The last line of a run that was killed is half a line.
            Err(error) if error.is_eof() => return Err(cut_short),
            Err(error) => {
                let (path, error) = (self.path.clone(), error.to_string());
                return Err(HistoryError::Line { path, line: self.read + 1, error });
            }
        };
        if let Record::Run(run) = &line.1
            && run.version != VERSION
        {
            return Err(HistoryError::Version { path: self.path.clone(), found: run.version });
        }
        if let Record::Done { lines } = line.1 {
            if lines != self.read {
                return Err(cut_short);
            }
            self.done = true;
        }
        self.read += 1;
        Ok(Some(line))
    }
}

impl Iterator for Reader {
    type Item = Result<Line, HistoryError>;

    fn next(&mut self) -> Option<Self::Item> {
        let line = self.next_line();
        if line.is_err() {
            self.done = true;
        }
        line.transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path, records: Vec<Record>) -> PathBuf {
        let path = folder.join("history.jsonl");
        let recorder = Recorder::create(&path).unwrap();
        for record in records {
            recorder.record(record);
        }
        recorder.finish().unwrap();
        path
    }

    #[test]
    fn what_was_recorded_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let record = Record::Fail { w: 1, n: 2, error: "rollback".into() };
        let path = write(folder.path(), vec![record.clone()]);
        let lines: Vec<_> = Reader::open(&path).unwrap().map(|line| line.unwrap().1).collect();
        assert_eq!(lines, [record, Record::Done { lines: 1 }]);
    }

    #[test]
    fn a_history_cut_short_anywhere_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = write(folder.path(), vec![Record::Begin { w: 1, n: 2 }, Record::Ok { w: 1, n: 2 }]);
        let whole = std::fs::read(&path).unwrap();
        for length in 0..whole.len() - 1 {
            std::fs::write(&path, &whole[..length]).unwrap();
            let last = Reader::open(&path).unwrap().last().unwrap();
            assert!(matches!(last, Err(HistoryError::CutShort { .. })), "{length}: {last:?}");
        }
    }

    #[test]
    fn a_history_of_another_version_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        for version in [VERSION - 1, VERSION + 1] {
            let run = crate::history::Run {
                version,
                seed: 1,
                server: String::new(),
                mutant: None,
                wall: 0,
                plan: serde_json::Value::Null,
            };
            let path = write(folder.path(), vec![Record::Run(run)]);
            let error = Reader::open(&path).unwrap().next().unwrap().unwrap_err();
            assert!(matches!(error, HistoryError::Version { found, .. } if found == version), "{error}");
        }
    }

    #[test]
    fn a_file_that_is_no_history_is_named_with_its_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        std::fs::write(&path, "hello\n").unwrap();
        let error = Reader::open(&path).unwrap().next().unwrap().unwrap_err().to_string();
        assert!(error.contains("line 1"), "{error}");
    }
}
