package inbox_test

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"
)

// ways are the methods by which a handler can send a statement.
var ways = map[string]func(ctx context.Context, tx pgx.Tx, sql string) error{
	"Exec": func(ctx context.Context, tx pgx.Tx, sql string) error {
		_, err := tx.Exec(ctx, sql)
		return err
	},
	"Query": func(ctx context.Context, tx pgx.Tx, sql string) error {
		rows, _ := tx.Query(ctx, sql, pgx.QueryExecModeSimpleProtocol)
		_, err := pgx.CollectRows(rows, pgx.RowToMap)
		return err
	},
	"QueryRow": func(ctx context.Context, tx pgx.Tx, sql string) error {
		return tx.QueryRow(ctx, sql, pgx.QueryExecModeSimpleProtocol).Scan(nil)
	},
	"SendBatch": func(ctx context.Context, tx pgx.Tx, sql string) error {
		batch := &pgx.Batch{}
		batch.Queue(sql)
		return tx.SendBatch(ctx, batch).Close()
	},
	"Prepare": func(ctx context.Context, tx pgx.Tx, sql string) error {
		_, err := tx.Prepare(ctx, "p", sql)
		return err
	},
	"savepoint": func(ctx context.Context, tx pgx.Tx, sql string) error {
		return pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error {
			_, err := tx.Exec(ctx, sql)
			return err
		})
	},
}

func TestTheHandlersTransactionRefusesStatementsThatEndIt(t *testing.T) {
	t.Parallel()
	e := setup(t)
	for _, sql := range []string{
		"commit", " COMMIT AND CHAIN", "end", "ABORT;", "rollback", "ROLLBACK WORK", "PREPARE TRANSACTION 'x'",
		"-- x\nCOMMIT", "-- x\rCOMMIT", "\vCOMMIT", "ROLLBACK\vWORK", "/* /* */ */ rollback", "rollback/**/work", "SELECT 1; COMMIT; BEGIN",
		"SELECT $a$;$$$a$; commit", "SELECT 'a''b'; COMMIT", `SELECT E'\''; COMMIT`, `SELECT 1 AS "a;"; COMMIT`,
		"SELECT E'a'\n'\\'' ; ROLLBACK; SELECT ''", `SELECT name'a\'; COMMIT`, "SELECT $é$'$é$; COMMIT", "SELECT 1 AS a$b$; COMMIT",
	} {
		for way, send := range ways {
			first, err := e.Handle(e.ctx, e.Pool, consumer, "m", func(ctx context.Context, tx pgx.Tx) error {
				if _, err := tx.Exec(ctx, e.effectSQL(), "m"); err != nil {
					t.Error(err)
				}
				if send(ctx, tx, sql) == nil {
					t.Errorf("%q by %s is not refused", sql, way)
				}
				return nil // also if the handler does not care
			})
			if first || err == nil {
				t.Errorf("%q by %s: %v, %v", sql, way, first, err)
			}
		}
	}
	e.want(t, "m", 0, 0)
}

func TestTheHandlersTransactionTakesStatementsThatOnlyLookLikeItsEnd(t *testing.T) {
	t.Parallel()
	e := setup(t)
	first, err := e.Handle(e.ctx, e.Pool, consumer, "m", func(ctx context.Context, tx pgx.Tx) error {
		for _, sql := range []string{
			"DO $$ BEGIN NULL; END $$", "DO $x$ BEGIN PERFORM '$$; COMMIT'; END; $x$", "SELECT '; COMMIT'",
			`SELECT 1 AS "; commit"`, "SELECT 1 -- ; commit", `SELECT E'\'; COMMIT'`, "SELECT $é$; COMMIT$é$", "/* /* */ ; commit */ SELECT 1",
			"SELECT CASE WHEN true THEN 1\nEND", "SELECT 1 AS commit", "PREPARE p2 AS SELECT 1",
			"SAVEPOINT s; SELECT 1; ROLLBACK TO s", "rollback /**/ transaction to savepoint s", "RELEASE s",
		} {
			if _, err := tx.Exec(ctx, sql); err != nil {
				t.Errorf("%q: %v", sql, err)
			}
		}
		_, err := tx.Exec(ctx, e.effectSQL(), "m")
		return err
	})
	if !first || err != nil {
		t.Errorf("%v, %v", first, err)
	}
	e.want(t, "m", 1, 1)
}
