package relay_test

import (
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/txbox/txbox/internal/testenv"
	"github.com/txbox/txbox/outbox"
	"github.com/txbox/txbox/relay"
)

// Settings that a role or a database can have change nothing.
func TestSettingsOfTheSessionDoNotMatter(t *testing.T) {
	t.Parallel()
	for name, value := range map[string]string{
		"default_transaction_isolation": "serializable",
		"TimeZone":                      "Asia/Kathmandu",
		"DateStyle":                     "German",
		"bytea_output":                  "escape",
		"search_path":                   "nowhere",
		"standard_conforming_strings":   "off",
		"enable_indexscan":              "off",
		"synchronous_commit":            "off",
		"plan_cache_mode":               "force_generic_plan",
		"row_security":                  "off",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			config, err := pgxpool.ParseConfig(b.db.URL)
			b.must(err)
			config.ConnConfig.RuntimeParams[name] = value
			usual := b.db.Pool
			b.db.Pool, err = pgxpool.NewWithConfig(testenv.Context(t), config)
			b.must(err)
			defer func() { b.db.Pool.Close(); b.db.Pool = usual }()
			messages := b.messages(200, func(i int) string { return fmt.Sprint(i % 7) })
			messages[0].Key, messages[0].NotBefore = "", time.Now().Add(200*time.Millisecond)
			messages[1].Key, messages[1].Exchange, messages[1].RoutingKey = "", "", testenv.Name(t)
			_, stop := b.start(brisk)
			b.write(messages...)
			b.eventuallyCount("outbox", 0)
			b.eventuallyCount("outbox_parked", 1)
			stop()
			want := append([]outbox.Message{messages[0]}, messages[2:]...)
			got := b.drain(b.queue, len(want))
			b.checkAll(got, want, 0)
			b.checkOrder(got, messages)
		})
	}
}

// Poolers dictate them: pgbouncer before 1.21 knows no prepared statements.
func TestQueryExecModesOfThePoolDoNotMatter(t *testing.T) {
	t.Parallel()
	for _, mode := range []pgx.QueryExecMode{
		pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol, pgx.QueryExecModeDescribeExec, pgx.QueryExecModeCacheDescribe,
	} {
		t.Run(mode.String(), func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			config, err := pgxpool.ParseConfig(b.db.URL)
			b.must(err)
			config.ConnConfig.DefaultQueryExecMode = mode
			config.ConnConfig.RuntimeParams["DateStyle"] = "German"
			config.ConnConfig.RuntimeParams["bytea_output"] = "escape"
			usual := b.db.Pool
			b.db.Pool, err = pgxpool.NewWithConfig(testenv.Context(t), config)
			b.must(err)
			defer func() { b.db.Pool.Close(); b.db.Pool = usual }()
			messages := b.messages(100, func(i int) string { return fmt.Sprint(i % 7) })
			absent, declare := b.absent()
			to(absent, messages[90:])
			_, stop := b.start(brisk)
			b.write(messages...)
			b.eventuallyCount("outbox", 0)
			b.checkAll(b.drain(b.queue, 90), messages[:90], 0)
			declare()
			got := b.drain(absent, 10)
			b.checkAll(got, messages[90:], 0)
			b.checkOrder(got, messages)
			b.eventuallyCount("outbox_parked", 0)
			stop()
		})
	}
}

// Two rows with one ID and one destination, neither of which has a queue, are both
// parked: one return does not stand for two.
func TestEveryReturnedRowIsParked(t *testing.T) {
	t.Parallel()
	b := setup(t)
	_, err := b.db.Exec(testenv.Context(t), `INSERT INTO `+b.db.Table("outbox")+` (message_id, routing_key, key)
		SELECT 'b0a0e3a4-2f4c-4a0e-9a44-000000000001', $1, NULL FROM generate_series(1, 500)`, testenv.Name(t))
	b.must(err)
	b.start(brisk)
	b.eventuallyCount("outbox", 0)
	if n := b.count("outbox_parked"); n != 500 {
		t.Errorf("%d of 500 rows are parked, the others are lost", n)
	}
}

// A row by raw SQL holds what Go's or AMQP's times cannot say.
func TestTimesThatCannotTravelAreRefusedByTheTable(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, table := range []string{"outbox", "outbox_parked"} {
		more, values := "", ""
		if table == "outbox_parked" {
			more, values = ", reason", ", 'dead'"
		}
		for _, at := range []string{"infinity", "-infinity", "10000-01-01 00:00:00+00", "1969-12-31 23:59:59+00", "0044-03-15 00:00:00+00 BC"} {
			_, err := b.db.Exec(testenv.Context(t), `INSERT INTO `+b.db.Table(table)+` (message_id, routing_key, created_at`+more+`)
				VALUES (gen_random_uuid(), 'q', $1::text::timestamptz`+values+`)`, at)
			if err == nil {
				t.Errorf("%s takes created_at %s", table, at)
			}
		}
	}
}

// What the README tells an operator to do with a dead message.
func TestADeadMessageIsSentAgainByHand(t *testing.T) {
	t.Parallel()
	b := setup(t)
	messages := b.messages(1, func(int) string { return "key" })
	messages[0].Exchange, messages[0].RoutingKey = "", testenv.Name(t)
	b.write(messages...)
	b.start(brisk, func(cfg *relay.Config, _ *relay.RabbitMQConfig) { cfg.RetryFor = time.Millisecond })
	testenv.Eventually(t, 30*time.Second, "it is dead", func() bool {
		var dead int
		b.must(b.db.QueryRow(testenv.Context(t), "SELECT count(*) FROM "+b.db.Table("outbox_parked")+" WHERE reason = 'dead'").Scan(&dead))
		return dead == 1
	})
	_, err := b.ch.QueueDeclare(messages[0].RoutingKey, true, false, false, false, nil)
	b.must(err)
	defer b.ch.QueueDelete(messages[0].RoutingKey, false, false, false)
	_, err = b.db.Exec(testenv.Context(t), "UPDATE "+b.db.Table("outbox_parked")+" SET reason = 'retry', due_at = now(), parked_at = now()")
	b.must(err)
	b.eventuallyCount("outbox_parked", 0)
	b.checkAll(b.drain(messages[0].RoutingKey, 1), messages, 0)
}

// In a database of another encoding what producers write may have no equal.
func TestDatabaseOfAnotherEncodingIsRefused(t *testing.T) {
	t.Parallel()
	admin := testenv.EmptySchema(t)
	ctx := testenv.Context(t)
	name := testenv.Name(t)
	if _, err := admin.Exec(ctx, "CREATE DATABASE "+name+" ENCODING LATIN1 LOCALE 'C' TEMPLATE template0"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := admin.Exec(testenv.Context(t), "DROP DATABASE "+name); err != nil {
			t.Error(err)
		}
	})
	u, err := url.Parse(admin.URL)
	if err != nil {
		t.Fatal(err)
	}
	u.Path = name
	b := setupAt(t, u.String(), testenv.AMQPURL(t))
	r, _ := b.start()
	testenv.Eventually(t, 20*time.Second, "it says that it needs UTF8", func() bool {
		err := r.Ready()
		return err != nil && strings.Contains(err.Error(), "encoded in LATIN1, txbox needs UTF8")
	})
}
