package inbox

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/txbox/txbox/internal/testenv"
)

// A consumer deletes its own records, a day after its horizon, those of parked messages
// excepted; one process at a time.
func TestAConsumerDeletesItsOldRecords(t *testing.T) {
	t.Parallel()
	db, ctx := testenv.Schema(t), testenv.Context(t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	// 2,500 records of each of two consumers: new, as old as the horizon, a day older than
	// that, in turn.
	_, err := db.Exec(ctx, `INSERT INTO `+db.Table("inbox")+` (consumer, message_id, received_at)
		SELECT c, n::text, now() - make_interval(hours => (ARRAY[0, 12, 36])[n % 3 + 1])
		FROM generate_series(1, 2500) AS n, unnest(ARRAY['ours', 'another''s']) AS c`)
	must(err)
	_, err = db.Exec(ctx, `INSERT INTO `+db.Table("inbox_parked")+` (consumer, message_id, reason) VALUES ('ours', '2', 'dead')`)
	must(err)
	c, err := NewConsumer(db.Pool, testenv.AMQPURL(t), "ours", func(context.Context, pgx.Tx, Message) error { return nil },
		Config{Schema: db.Schema, Horizon: 10 * time.Hour, Logger: slog.New(slog.DiscardHandler)})
	must(err)
	left := func(condition string) (n int) {
		t.Helper()
		must(db.QueryRow(ctx, "SELECT count(*) FROM "+db.Table("inbox")+" WHERE "+condition).Scan(&n))
		return n
	}

	tx, err := db.Begin(ctx) // another process is about to do it
	must(err)
	defer tx.Rollback(ctx)
	var locked bool
	must(tx.QueryRow(ctx, pruneLockSQL, db.Schema, "ours").Scan(&locked))
	c.pruneOnce(ctx)
	if n := left("true"); !locked || n != 5000 || c.Stats().Pruned != 0 {
		t.Fatalf("%d records left while another prunes", n)
	}
	must(tx.Rollback(ctx))

	c.pruneOnce(ctx)
	const old = 833 // n % 3 = 2
	if n := left("consumer = 'ours'"); n != 2500-old+1 {
		t.Errorf("%d records left", n)
	}
	if n := left("consumer = 'ours' AND message_id = '2'"); n != 1 {
		t.Error("the record of a parked message is gone: it would be handled when it comes again")
	}
	if n := left("consumer <> 'ours'"); n != 2500 {
		t.Errorf("%d records left of another consumer", n)
	}
	if n := c.Stats().Pruned; n != old-1 {
		t.Errorf("Stats: %d pruned", n)
	}
}
