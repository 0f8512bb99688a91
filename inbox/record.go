package inbox

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"reflect"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/txbox/txbox/internal/dbschema"
	"github.com/txbox/txbox/internal/wire"
)

// Record records in the caller's transaction that consumer has received the
// message. If first is false, it was recorded before: change nothing. If first is
// true, make the change in the same transaction; when that rolls back, the record
// is gone too. Call it before the change: a concurrent twin then waits for this
// transaction to end instead of doing the work twice.
//
// consumer has 1 to 100 bytes, messageID 1 to 255, both UTF-8 without NUL; the
// error names what breaks that, and leaves the transaction usable. Any other
// error is the database's and has aborted the transaction. Under REPEATABLE READ
// and SERIALIZABLE a concurrent twin is SQLSTATE 40001: run the transaction again.
// Cancelling ctx closes the connection of tx, as in pgx.
func Record(ctx context.Context, tx pgx.Tx, consumer, messageID string) (first bool, err error) {
	return Recorder{}.Record(ctx, tx, consumer, messageID)
}

// RecordSQL is Record for database/sql, with any PostgreSQL driver.
func RecordSQL(ctx context.Context, tx *sql.Tx, consumer, messageID string) (first bool, err error) {
	return Recorder{}.RecordSQL(ctx, tx, consumer, messageID)
}

// Prune forgets the messages that were received more than olderThan ago by the
// database's clock, except those that are parked, and returns how many it
// forgot. A message that is delivered after it was forgotten takes effect again,
// so keep them longer than any message can wait in a queue or be sent again.
//
// It works in transactions of a few hundred rows, with pauses between them, and may run
// beside live traffic and other Prunes. When it fails or ctx ends, what is done stays done and
// is counted. An olderThan that is not positive is refused.
func Prune(ctx context.Context, db *pgxpool.Pool, olderThan time.Duration) (int64, error) {
	return Recorder{}.Prune(ctx, db, olderThan)
}

// Recorder is Record, RecordSQL, Handle, HandleSQL and Prune with settings. The
// zero value works; a Recorder may be copied and used by several goroutines.
type Recorder struct {
	Schema string // the database schema of txbox's tables; default "txbox"
}

// Record is the function Record, with the Recorder's settings.
func (r Recorder) Record(ctx context.Context, tx pgx.Tx, consumer, messageID string) (first bool, err error) {
	if isNil(tx) {
		return false, errors.New("inbox: tx is nil")
	}
	schema, err := r.check(consumer, messageID)
	if err != nil {
		return false, err
	}
	tag, err := tx.Exec(ctx, recordSQL(schema), consumer, messageID, nil)
	if err != nil {
		return false, fmt.Errorf("inbox: record: %w", err)
	}
	return tag.RowsAffected() == 1, nil
}

// RecordSQL is the function RecordSQL, with the Recorder's settings.
func (r Recorder) RecordSQL(ctx context.Context, tx *sql.Tx, consumer, messageID string) (first bool, err error) {
	if tx == nil {
		return false, errors.New("inbox: tx is nil")
	}
	schema, err := r.check(consumer, messageID)
	if err != nil {
		return false, err
	}
	result, err := tx.ExecContext(ctx, recordSQL(schema), consumer, messageID, nil)
	if err != nil {
		return false, fmt.Errorf("inbox: record: %w", err)
	}
	rows, err := result.RowsAffected()
	if err != nil {
		return false, fmt.Errorf("inbox: record: %w", err)
	}
	return rows == 1, nil
}

// Prune is the function Prune, with the Recorder's settings.
func (r Recorder) Prune(ctx context.Context, db *pgxpool.Pool, olderThan time.Duration) (total int64, err error) {
	schema, err := dbschema.Name(r.Schema)
	switch {
	case err != nil:
		return 0, fmt.Errorf("inbox: %w", err)
	case db == nil:
		return 0, errors.New("inbox: db is nil")
	case olderThan <= 0:
		return 0, fmt.Errorf("inbox: olderThan: %s is not positive", olderThan)
	}
	records := pruner{schema: schema, olderThan: olderThan}
	if err = records.run(ctx, db, func(pruned int64, _ error) { total += pruned }); err != nil {
		err = fmt.Errorf("inbox: prune: %w", err)
	}
	return total, err
}

const (
	maxConsumer  = 100 // bytes, as the table's CHECK
	maxMessageID = 255 // likewise; also AMQP's limit
)

// check returns the schema to work on.
func (r Recorder) check(consumer, messageID string) (schema string, err error) {
	schema, err = dbschema.Name(r.Schema)
	if err == nil {
		err = checkName("consumer", consumer, maxConsumer)
	}
	if err == nil {
		err = checkName("messageID", messageID, maxMessageID)
	}
	if err != nil {
		return "", fmt.Errorf("inbox: %w", err)
	}
	return schema, nil
}

func checkName(field, value string, limit int) error {
	if value == "" {
		return fmt.Errorf("%s: is empty", field)
	}
	if len(value) > limit {
		return fmt.Errorf("%s: is %d bytes long, the limit is %d", field, len(value), limit)
	}
	if err := wire.CheckText(value); err != nil {
		return fmt.Errorf("%s: %w", field, err)
	}
	return nil
}

func isNil(tx pgx.Tx) bool {
	v := reflect.ValueOf(tx)
	return !v.IsValid() || v.Kind() == reflect.Pointer && v.IsNil()
}
