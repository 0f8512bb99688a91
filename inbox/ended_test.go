package inbox_test

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/txbox/txbox/inbox"
)

// A handler commits behind the back of the consumer what those before it have queued, or not.
func TestACommitByHandLosesNothingThatIsQueued(t *testing.T) {
	t.Parallel()
	for _, statements := range [][]string{{"COMMIT"}, {"ROLLBACK"}, {"COMMIT", "DO $$ BEGIN RAISE SQLSTATE '55P03'; END $$"}} {
		b := setupBroker(t)
		c := b.inOneBatch(t, b.Pool, b.config(t), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
			b.pipeline(tx, m.ID)
			if m.ID == "2" {
				for _, sql := range statements {
					if _, err := tx.Conn().Exec(ctx, sql); err != nil {
						return err
					}
				}
			}
			return nil
		}, numbered(5)...)
		c.waitFor(t, "the culprit is dead", func(s inbox.Stats) bool { return s.Parked["dead"] == 1 })
		b.wantReady(t, 0)
		c.stop()
		for _, id := range []string{"0", "1", "3", "4"} {
			b.want(t, id, 1, 1)
		}
	}
}

// A handler meets with the failure of an earlier one's function, and commits all the same.
func TestACommitByHandAfterAnotherFailedDoublesNothing(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	c := b.inOneBatch(t, b.Pool, b.config(t), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		q := b.pipeline(tx, m.ID)
		switch m.ID {
		case "0":
			q.Exec(func(pgconn.CommandTag) error { return errTest })
		case "2":
			if _, err := tx.Exec(ctx, "SELECT 1"); err != nil {
				_, err = tx.Conn().Exec(ctx, "COMMIT")
				return err
			}
		}
		return nil
	}, numbered(5)...)
	c.waitFor(t, "the culprit is dead", func(s inbox.Stats) bool { return s.Parked["dead"] == 1 })
	b.wantReady(t, 0)
	c.stop()
	for _, id := range []string{"1", "3", "4"} {
		b.want(t, id, 1, 1)
	}
}

// rewriter sends another statement than was queued.
type rewriter string

func (r rewriter) RewriteQuery(context.Context, *pgx.Conn, string, []any) (string, []any, error) {
	return string(r), nil, nil
}

// What is queued ends the transaction, and nobody can tell before it is sent.
func TestAVeiledEndOfTheTransactionIsItsMessagesAlone(t *testing.T) {
	t.Parallel()
	for _, end := range []string{"COMMIT", "ROLLBACK"} {
		for what, queue := range map[string]func(ctx context.Context, tx pgx.Tx) error{
			"name": func(ctx context.Context, tx pgx.Tx) error {
				_, err := tx.Conn().Prepare(ctx, "bye", end)
				inbox.Pipeline(tx).Queue("bye")
				return err
			},
			"name with a function": func(ctx context.Context, tx pgx.Tx) error {
				_, err := tx.Conn().Prepare(ctx, "bye", end)
				inbox.Pipeline(tx).Queue("bye").Exec(func(pgconn.CommandTag) error { return nil })
				return err
			},
			"rewriter": func(_ context.Context, tx pgx.Tx) error {
				inbox.Pipeline(tx).Queue("SELECT 1", rewriter(end))
				return nil
			},
		} {
			t.Run(end+" by "+what, func(t *testing.T) {
				t.Parallel()
				b := setupBroker(t)
				c := b.inOneBatch(t, b.Pool, b.config(t), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
					b.pipeline(tx, m.ID)
					if m.ID == "2" {
						return queue(ctx, tx)
					}
					return nil
				}, numbered(5)...)
				c.waitFor(t, "the culprit is dead", func(s inbox.Stats) bool { return s.Parked["dead"] == 1 })
				b.wantReady(t, 0)
				c.stop()
				for _, id := range []string{"0", "1", "3", "4"} {
					b.want(t, id, 1, 1)
				}
				if row := b.parked(t, "2"); row.reason != "dead" {
					t.Errorf("%+v", row)
				}
			})
		}
	}
}
