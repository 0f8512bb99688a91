package inbox

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

var (
	// ErrCommitUnknown is returned when the connection was lost, or ctx ended,
	// around COMMIT: the transaction may have committed or not. Call again with the
	// same ID, which finds out.
	ErrCommitUnknown = errors.New("outcome of COMMIT is unknown")
	// ErrTxEnded is returned when the handler ended its transaction behind the
	// back of this package, with a COMMIT or ROLLBACK of its own. What it had done
	// may be committed, with or without the record of the message.
	ErrTxEnded = errors.New("the handler ended the transaction")
)

const (
	// callTimeout bounds each call to a server that is not the handler's.
	callTimeout = 10 * time.Second
	// answerTimeout is how long a database that is asked nothing may take to answer.
	answerTimeout = time.Second
	// rollbackTimeout bounds what is still done after a context has ended.
	rollbackTimeout = 5 * time.Second
)

// statement is one SQL statement with its arguments.
type statement struct {
	sql  string
	args []any
}

// transaction is one on a connection of its own.
type transaction struct {
	pgx.Tx
	conn *pgxpool.Conn
}

// begin begins a transaction and runs in it what queue queues, in one round trip. The
// caller commits, and ends it in any case.
func begin(ctx context.Context, db *pgxpool.Pool, queue func(*pgx.Batch)) (*transaction, error) {
	conn, err := db.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	batch := &pgx.Batch{}
	batch.BeginTx(pgx.TxOptions{})
	queue(batch)
	results := conn.SendBatch(ctx, batch)
	t := &transaction{results.Tx(), conn}
	if err := results.Close(); err != nil {
		t.end(ctx)
		return nil, err
	}
	return t, nil
}

// end gives up what t did, unless it is over already, and returns its connection to
// the pool. It also works after ctx has ended.
func (t *transaction) end(ctx context.Context) {
	if !t.isOver() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rollbackTimeout)
		defer cancel()
		_ = t.Rollback(ctx) // then the connection is closed, which does the same
	}
	t.conn.Release()
}

// isOver reports whether the server has committed or rolled back.
func (t *transaction) isOver() bool { return t.conn.Conn().PgConn().TxStatus() == 'I' }

// commit commits t, or returns ctx's error without having tried.
func (t *transaction) commit(ctx context.Context) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return commitError(t.Commit(ctx))
}

// commitError tells a COMMIT that the server refused from one whose outcome
// nobody knows.
func commitError(err error) error {
	if err == nil || refused(err) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrCommitUnknown, err)
}

// refused reports whether err says for certain that COMMIT did nothing. FATAL is
// no such answer: it can arrive in place of the success of a COMMIT that was
// done, and poolers say so of a server that they lost. Nor are the classes of
// errors that drivers and poolers report with another severity. Nor is
// pgconn.SafeToRetry: of a connection that broke while the answer was awaited,
// pgx 5.12 says "conn closed" and that nothing was sent.
func refused(err error) bool {
	if errors.Is(err, pgx.ErrTxCommitRollback) {
		return true
	}
	if pgErr := (*pgconn.PgError)(nil); errors.As(err, &pgErr) {
		severity := pgErr.SeverityUnlocalized
		if severity == "" {
			severity = pgErr.Severity
		}
		if severity == "FATAL" || severity == "PANIC" {
			return false
		}
	}
	code := sqlState(err)
	for _, unknown := range []string{"08", "40003", "57P", "58", "XX"} {
		if strings.HasPrefix(code, unknown) {
			return false
		}
	}
	return code != ""
}

// isConflict reports whether err is a serialization failure or a deadlock: the
// transaction is rolled back, and running it again is the remedy.
func isConflict(err error) bool {
	code := sqlState(err)
	return (code == "40001" || code == "40P01") && !errors.Is(err, ErrTxEnded)
}

// isOutage reports whether err says that the server lacks what it needs, or takes no writes,
// whoever asks. 53400 is a limit that is the client's own, such as temp_file_limit.
func isOutage(err error) bool {
	code := sqlState(err)
	return (strings.HasPrefix(code, "53") && code != "53400" || code == "25006") && !errors.Is(err, ErrTxEnded)
}

// isUnsent reports whether err says that pgx could not encode an argument of a batch, for
// which it closes the connection. Its step is not exported.
func isUnsent(err error) bool {
	unsent := pgx.ErrPreprocessingBatch{}
	return errors.As(err, &unsent) && strings.Contains(unsent.Error(), "(build)")
}

// isContested reports whether err says that others want the same rows at the same time.
func isContested(err error) bool { return isConflict(err) || isLocked(err) }

// isLocked reports whether err says that a lock was not to be had in time.
func isLocked(err error) bool { return sqlState(err) == "55P03" && !errors.Is(err, ErrTxEnded) }

// sound returns err, or another in its place if it panics when it is asked what it
// is: a nil pointer of an error's type is not nil.
func sound(err error) (safe error) {
	if err == nil {
		return nil
	}
	defer func() {
		if recover() != nil {
			safe = fmt.Errorf("%T without a text", err)
		}
	}()
	_ = err.Error() // these are asked to see whether they panic
	_ = sqlState(err)
	_ = errors.Is(err, ErrTxEnded)
	return err
}

// sqlState returns the SQLSTATE of an error of pgx or another driver, or "".
func sqlState(err error) string {
	if e := (interface{ SQLState() string })(nil); errors.As(err, &e) {
		return e.SQLState()
	}
	return ""
}

// maxRuns bounds how often a transaction is run that fails through no fault of
// its own.
const maxRuns = 10

// runBackOff waits some 5 ms after the first run and doubles up to about a second.
func runBackOff() *backoff.ExponentialBackOff {
	return &backoff.ExponentialBackOff{
		InitialInterval: 5 * time.Millisecond, RandomizationFactor: 0.5, Multiplier: 2, MaxInterval: time.Second,
	}
}

// runConflicting runs once again while it fails by conflict. backoff.Retry is no
// choice here: it takes orders from the errors of the caller's function.
func runConflicting(ctx context.Context, once func() (bool, error)) (bool, error) {
	wait := runBackOff()
	for run := 1; ; run++ {
		first, err := once()
		if err == nil || run == maxRuns || !isConflict(err) {
			return first, err
		}
		if !sleep(ctx, wait.NextBackOff()) {
			return false, fmt.Errorf("%w (%w)", err, context.Cause(ctx))
		}
	}
}

// sleep reports whether it was not cut short by the end of ctx.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}
