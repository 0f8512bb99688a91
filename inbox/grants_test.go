package inbox_test

import (
	"context"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/txbox/txbox/inbox"
	"github.com/txbox/txbox/internal/testenv"
)

// What doc.go says that a role needs is enough.
func TestGrantsThatAreDocumentedSuffice(t *testing.T) {
	t.Parallel()
	e := setup(t)
	apply := func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "INSERT INTO "+e.Table("effects")+" VALUES ('x', 1)")
		return err
	}
	handler := e.As(t, map[string]string{"inbox": "INSERT", "effects": "INSERT"})
	for want := range 2 {
		first, err := e.Handle(e.ctx, handler.Pool, "consumer", "1", apply)
		if err != nil || first != (want == 0) {
			t.Errorf("call %d: %t, %v", want, first, err)
		}
	}
	pruner := e.As(t, map[string]string{"inbox": "SELECT, DELETE", "inbox_parked": "SELECT"})
	if n, err := e.Prune(e.ctx, pruner.Pool, time.Nanosecond); n != 1 || err != nil {
		t.Errorf("pruned %d: %v", n, err)
	}
}

func TestAConsumerNeedsNoMoreThanItsGrants(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	consumer := b.As(t, map[string]string{
		"inbox": "SELECT, INSERT, DELETE", "inbox_parked": "SELECT, INSERT, UPDATE, DELETE", "txbox_version": "SELECT", "effects": "INSERT",
	})
	b.publish(t, numbered(5)...)
	c := b.run(t, consumer.Pool, testenv.AMQPURL(t), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if m.ID == "3" && m.Attempt == 1 {
			return errTest
		}
		return b.apply(ctx, tx, m)
	}, b.config(t))
	c.waitFor(t, "all applied", func(s inbox.Stats) bool { return s.Applied == 5 })
	c.stop()
	b.wantReady(t, 0)
	b.wantOneEffectEach(t, 5)
}
