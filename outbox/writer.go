package outbox

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"reflect"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/txbox/txbox/internal/dbschema"
	"github.com/txbox/txbox/internal/wire"
)

// Write adds messages to the outbox in the caller's transaction: they will be
// published if and only if tx commits. Any number of messages, of up to 256 MiB
// of payloads together, is one statement
// and one round trip; none is a no-op.
//
// Every message is validated before anything is sent: an *InvalidError leaves
// the transaction usable. Any other error is the database's and has aborted the
// transaction, or says that it was over before. Cancelling ctx closes the
// connection of tx, as in pgx.
func Write(ctx context.Context, tx pgx.Tx, msgs ...Message) error {
	return Writer{}.Write(ctx, tx, msgs...)
}

// WriteSQL is Write for database/sql, with any PostgreSQL driver.
func WriteSQL(ctx context.Context, tx *sql.Tx, msgs ...Message) error {
	return Writer{}.WriteSQL(ctx, tx, msgs...)
}

// Queue adds the statement of Write to the caller's batch instead of sending it,
// so that business change and messages share a round trip. The batch must run in
// the transaction of the business change: begin it with b.BeginTx, or send it on
// a pgx.Tx. A batch sent on a pool or connection without BeginTx is a
// transaction of its own. An *InvalidError leaves the batch as it was.
func Queue(ctx context.Context, b *pgx.Batch, msgs ...Message) error {
	return Writer{}.Queue(ctx, b, msgs...)
}

// Writer is Write, WriteSQL and Queue with settings. The zero value works; a
// Writer may be copied and used by several goroutines.
type Writer struct {
	// Schema is the database schema of txbox's tables; default "txbox".
	Schema string
	// MaxPayload is the most bytes that a payload may have; default 8 MiB, at most
	// 128 MiB. Keep it below RabbitMQ's max_message_size (16 MiB since 4.0).
	MaxPayload int
	// Inject, if set, adds headers to each message, such as the trace context of
	// ctx. It gets a copy of the message's headers; keys that the caller set win.
	Inject func(ctx context.Context, headers map[string]string)
}

const (
	defaultMaxPayload = 8 << 20
	// maxTotal is for all payloads of one call. PostgreSQL's protocol carries 1 GiB
	// in one piece, and text drivers write two bytes for each.
	maxTotal = 256 << 20
)

// Write is the function Write, with the Writer's settings.
func (w Writer) Write(ctx context.Context, tx pgx.Tx, msgs ...Message) error {
	if v := reflect.ValueOf(tx); !v.IsValid() || v.Kind() == reflect.Pointer && v.IsNil() {
		return errors.New("outbox: tx is nil")
	}
	stmt, err := w.prepare(ctx, msgs)
	if err != nil || stmt == nil {
		return err
	}
	if _, err := tx.Exec(ctx, stmt.sql, stmt.columns.arrays()...); err != nil {
		return writeError(err)
	}
	return nil
}

// WriteSQL is the function WriteSQL, with the Writer's settings.
func (w Writer) WriteSQL(ctx context.Context, tx *sql.Tx, msgs ...Message) error {
	if tx == nil {
		return errors.New("outbox: tx is nil")
	}
	stmt, err := w.prepare(ctx, msgs)
	if err != nil || stmt == nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, stmt.sql, stmt.columns.literals()...); err != nil {
		return writeError(err)
	}
	return nil
}

func writeError(err error) error {
	var state interface{ SQLState() string } // of all drivers
	if errors.As(err, &state) && state.SQLState() == "42P01" {
		return fmt.Errorf("outbox: write: %w; run \"relay migrate up\"", err)
	}
	return fmt.Errorf("outbox: write: %w", err)
}

// Queue is the function Queue, with the Writer's settings.
func (w Writer) Queue(ctx context.Context, b *pgx.Batch, msgs ...Message) error {
	if b == nil {
		return errors.New("outbox: batch is nil")
	}
	stmt, err := w.prepare(ctx, msgs)
	if err != nil || stmt == nil {
		return err
	}
	b.Queue(stmt.sql, stmt.columns.arrays()...)
	return nil
}

type statement struct {
	sql     string
	columns *columnArrays
}

// prepare validates all messages and returns the statement that writes them, or
// nil if there are none.
func (w Writer) prepare(ctx context.Context, msgs []Message) (*statement, error) {
	schema, err := dbschema.Name(w.Schema)
	if err != nil {
		return nil, fmt.Errorf("outbox: %w", err)
	}
	maxPayload := w.MaxPayload
	if maxPayload == 0 {
		maxPayload = defaultMaxPayload
	}
	if maxPayload < 0 || maxPayload > wire.MaxPayload {
		return nil, fmt.Errorf("outbox: MaxPayload: %d is not one of 1 to %d bytes", w.MaxPayload, wire.MaxPayload)
	}
	if len(msgs) == 0 {
		return nil, nil
	}
	arrays := newColumnArrays(len(msgs))
	seen := make(map[uuid.UUID]int)
	build, total := writeSQL, 0
	for i := range msgs {
		m := msgs[i] // a copy: the caller's message is not changed
		if w.Inject != nil {
			m.Headers = w.injected(ctx, m.Headers)
		}
		if field, reason := m.problem(maxPayload); field != "" {
			return nil, &InvalidError{Index: i, Field: field, Reason: reason}
		}
		if m.ID == uuid.Nil {
			m.ID = NewID()
		} else if first, twice := seen[m.ID]; twice {
			return nil, &InvalidError{Index: i, Field: "ID", Reason: fmt.Sprintf("is that of message %d too", first)}
		}
		if len(msgs) > 1 {
			seen[m.ID] = i
		}
		if !m.NotBefore.IsZero() {
			build = scheduleSQL
		}
		if total += len(m.Payload); total > maxTotal {
			return nil, &InvalidError{Index: i, Field: "Payload",
				Reason: fmt.Sprintf("brings those of one call to %d bytes, the limit is %d: write them in several calls", total, maxTotal)}
		}
		if err := arrays.add(&m); err != nil {
			return nil, err
		}
	}
	return &statement{sql: build(schema), columns: arrays}, nil
}

func (w Writer) injected(ctx context.Context, headers map[string]string) map[string]string {
	all := make(map[string]string, len(headers)+2)
	maps.Copy(all, headers)
	w.Inject(ctx, all)
	maps.Copy(all, headers)
	return all
}
