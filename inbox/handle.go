package inbox

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Handle runs fn in a transaction that also records that consumer has received
// the message, so that what fn does with tx happens once per message:
//
//	(true, nil)   committed: the record, and what fn did
//	(false, nil)  recorded before; fn was not called
//	(false, err)  nothing was recorded; whether and when to call again is up to you
//
// fn's error is wrapped, and rolls back; so does a panic, which goes on. tx
// refuses Commit, Rollback and statements that do the same; Begin makes
// savepoints. After a serialization failure or a deadlock, from fn or elsewhere,
// all is run again after a short wait, up to 10 times or until ctx ends: fn may be
// called several times, and its effects outside tx are its own concern.
//
// Two errors leave it open what was committed. ErrCommitUnknown: call again with
// the same ID. ErrTxEnded: fn ended the transaction in a way that tx cannot see,
// such as through tx.Conn; mend fn. (AND CHAIN sent that way hides even from this.)
//
// Limits and errors of consumer and messageID are those of Record. The isolation
// level is the pool's default. Cancelling ctx rolls back, and nothing happens if it
// has ended before.
func Handle(ctx context.Context, db *pgxpool.Pool, consumer, messageID string, fn func(context.Context, pgx.Tx) error) (first bool, err error) {
	return Recorder{}.Handle(ctx, db, consumer, messageID, fn)
}

// HandleSQL is Handle for database/sql, with any PostgreSQL driver. It cannot
// refuse tx.Commit and tx.Rollback: a fn that calls them ends in ErrTxEnded.
func HandleSQL(ctx context.Context, db *sql.DB, consumer, messageID string, fn func(context.Context, *sql.Tx) error) (first bool, err error) {
	return Recorder{}.HandleSQL(ctx, db, consumer, messageID, fn)
}

// Handle is the function Handle, with the Recorder's settings.
func (r Recorder) Handle(ctx context.Context, db *pgxpool.Pool, consumer, messageID string, fn func(context.Context, pgx.Tx) error) (first bool, err error) {
	if db == nil || fn == nil {
		return false, errors.New("inbox: db or fn is nil")
	}
	schema, err := r.check(consumer, messageID)
	if err != nil {
		return false, err
	}
	record := statement{recordSQL(schema), []any{consumer, messageID, nil}}
	first, err = runConflicting(ctx, func() (bool, error) { return handle(ctx, db, record, fn) })
	if err != nil {
		return false, fmt.Errorf("inbox: %w", err)
	}
	return first, nil
}

func handle(ctx context.Context, db *pgxpool.Pool, record statement, fn func(context.Context, pgx.Tx) error) (first bool, err error) {
	tx, err := begin(ctx, db, func(b *pgx.Batch) {
		b.Queue(record.sql, record.args...).Exec(func(tag pgconn.CommandTag) error {
			first = tag.RowsAffected() == 1
			return nil
		})
	})
	if err != nil {
		return false, fmt.Errorf("record: %w", err)
	}
	defer tx.end(ctx) // also when fn panics
	if !first {
		return false, nil
	}
	guarded := newGuard(ctx, tx)
	err = guarded.check(sound(fn(ctx, guarded)))
	if err == nil {
		err = guarded.check(guarded.flush(ctx))
	}
	if err != nil {
		return false, fmt.Errorf("handle: %w", err)
	}
	if err := tx.commit(ctx); err != nil {
		return false, fmt.Errorf("commit: %w", err)
	}
	return true, nil
}

// HandleSQL is the function HandleSQL, with the Recorder's settings.
func (r Recorder) HandleSQL(ctx context.Context, db *sql.DB, consumer, messageID string, fn func(context.Context, *sql.Tx) error) (first bool, err error) {
	if db == nil || fn == nil {
		return false, errors.New("inbox: db or fn is nil")
	}
	schema, err := r.check(consumer, messageID)
	if err != nil {
		return false, err
	}
	record := statement{recordXIDSQL(schema), []any{consumer, messageID, nil}}
	first, err = runConflicting(ctx, func() (bool, error) { return handleSQL(ctx, db, record, fn) })
	if err != nil {
		return false, fmt.Errorf("inbox: %w", err)
	}
	return first, nil
}

func handleSQL(ctx context.Context, db *sql.DB, record statement, fn func(context.Context, *sql.Tx) error) (first bool, err error) {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return false, fmt.Errorf("begin: %w", err)
	}
	defer tx.Rollback() // also when fn panics
	var xid int64
	err = tx.QueryRowContext(ctx, record.sql, record.args...).Scan(&xid)
	if errors.Is(err, sql.ErrNoRows) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("record: %w", err)
	}
	if err := checkSQL(ctx, tx, xid, sound(fn(ctx, tx))); err != nil {
		return false, fmt.Errorf("handle: %w", err)
	}
	if err := commitError(tx.Commit()); err != nil {
		return false, fmt.Errorf("commit: %w", err)
	}
	return true, nil
}

// checkSQL is guard.check for a driver that does not tell the state of a
// transaction; the server does, for a round trip.
func checkSQL(ctx context.Context, tx *sql.Tx, xid int64, fnErr error) error {
	var same bool
	err := tx.QueryRowContext(ctx, sameXIDSQL, xid).Scan(&same)
	switch {
	case ctx.Err() != nil: // database/sql has rolled back
		return errors.Join(fnErr, context.Cause(ctx))
	case errors.Is(err, sql.ErrTxDone), err == nil && !same:
		return errors.Join(ErrTxEnded, fnErr)
	case fnErr != nil:
		return fnErr
	case sqlState(err) == "25P02":
		return fmt.Errorf("the handler ignored an error of the database: %w", err)
	}
	return err
}
