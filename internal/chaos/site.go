package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/internal/faultproxy"
	"github.com/txbox/txbox/internal/servers"
	"github.com/txbox/txbox/migrations"
)

// site is what the processes of a run work with: servers of its own, and a proxy before each
// for each role.
type site struct {
	postgres   *servers.Postgres
	broker     *servers.RabbitMQ
	shop, till *pgxpool.Pool // without a proxy
	check      *pgx.Conn     // on the server of "make up", which has no faults
	proxies    map[string]*faultproxy.Proxy
	secrets    []string // are to be in no log
	canary     string
	amqpURL    string // of the broker, as its clients log in
}

// databases of the private server.
const (
	shopDatabase = "chaos_shop"
	tillDatabase = "chaos_till"
)

// openSite starts servers in dir, from nothing.
func openSite(ctx context.Context, dir string, seed uint64) (*site, error) {
	s := &site{
		postgres: &servers.Postgres{Dir: filepath.Join(dir, "postgres")},
		broker:   &servers.RabbitMQ{Dir: filepath.Join(dir, "rabbitmq")},
		proxies:  make(map[string]*faultproxy.Proxy),
		secrets:  []string{fmt.Sprintf("db-secret-%d", seed), fmt.Sprintf("amqp-secret-%d", seed)},
		canary:   fmt.Sprintf("canary-%d", seed),
	}
	if err := errors.Join(s.postgres.Remove(ctx), s.broker.Remove(ctx)); err != nil {
		return nil, err
	}
	started := make(chan error, 1)
	go func() { started <- s.broker.Start(ctx) }()
	err := s.postgres.Start(ctx)
	if err = errors.Join(err, <-started); err == nil {
		err = errors.Join(s.openDatabases(ctx), s.openBroker(ctx))
	}
	if err == nil {
		err = s.openProxies()
	}
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// close stops the servers and deletes what they have.
func (s *site) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, p := range s.proxies {
		p.Close()
	}
	for _, db := range []*pgxpool.Pool{s.shop, s.till} {
		if db != nil {
			db.Close()
		}
	}
	if s.check != nil {
		s.check.Close(ctx)
	}
	return errors.Join(s.postgres.Remove(ctx), s.broker.Remove(ctx))
}

func (s *site) openDatabases(ctx context.Context) (err error) {
	admin, err := pgx.Connect(ctx, s.postgres.URL())
	if err != nil {
		return err
	}
	defer admin.Close(ctx)
	_, err = admin.Exec(ctx, fmt.Sprintf("CREATE ROLE chaos LOGIN SUPERUSER PASSWORD '%s'", s.secrets[0]))
	if err != nil {
		return err
	}
	for _, d := range []struct {
		name, tables string
		pool         **pgxpool.Pool
	}{{shopDatabase, shopTables, &s.shop}, {tillDatabase, tillTables, &s.till}} {
		if _, err := admin.Exec(ctx, "CREATE DATABASE "+d.name); err != nil {
			return err
		}
		url := s.databaseURL(d.name, s.postgresAddress())
		if err := migrations.Up(ctx, url, migrations.Config{}); err != nil {
			return err
		}
		if *d.pool, err = pgxpool.New(ctx, url); err != nil {
			return err
		}
		if _, err := (*d.pool).Exec(ctx, d.tables); err != nil {
			return err
		}
	}
	return s.openCheck(ctx)
}

func (s *site) openCheck(ctx context.Context) (err error) {
	if s.check, err = pgx.Connect(ctx, os.Getenv("DATABASE_URL")); err != nil {
		return fmt.Errorf("DATABASE_URL: %w", err)
	}
	_, err = s.check.Exec(ctx, "DROP SCHEMA IF EXISTS chaos_check CASCADE; CREATE SCHEMA chaos_check; SET search_path = chaos_check")
	return err
}

func (s *site) openBroker(ctx context.Context) error {
	for _, args := range [][]string{
		{"add_user", "chaos", s.secrets[1]},
		{"set_permissions", "chaos", ".*", ".*", ".*"},
	} {
		if _, err := s.broker.Ctl(ctx, args...); err != nil {
			return err
		}
	}
	s.amqpURL = strings.Replace(s.broker.URL(), "guest:guest", "chaos:"+s.secrets[1], 1)
	if err := s.withChannel(topology); err != nil {
		return err
	}
	return s.broker.Sync(ctx)
}

// withChannel works on a channel without a proxy.
func (s *site) withChannel(do func(*amqp.Channel) error) error {
	conn, err := amqp.Dial(s.amqpURL)
	if err != nil {
		return err
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		return err
	}
	return do(ch)
}

// Names of proxies: who goes through them, and where to.
const (
	producerDB     = "producer-db"
	relayDB        = "relay-db"
	consumerDB     = "consumer-db"
	relayBroker    = "relay-broker"
	consumerBroker = "consumer-broker"
)

func (s *site) openProxies() error {
	broker, err := faultproxy.HostOf(s.amqpURL)
	if err != nil {
		return err
	}
	for _, name := range []string{producerDB, relayDB, consumerDB} {
		if s.proxies[name], err = faultproxy.New(s.postgresAddress(), faultproxy.PostgreSQL); err != nil {
			return err
		}
	}
	for _, name := range []string{relayBroker, consumerBroker} {
		if s.proxies[name], err = faultproxy.New(broker, faultproxy.AMQP); err != nil {
			return err
		}
	}
	return nil
}

func (s *site) postgresAddress() string {
	address, _ := faultproxy.HostOf(s.postgres.URL()) // our own URL is well-formed
	return address
}

func (s *site) databaseURL(name, address string) string {
	return fmt.Sprintf("postgres://chaos:%s@%s/%s?sslmode=disable", s.secrets[0], address, name)
}

// environment tells a child of that role where its servers are.
func (s *site) environment(database, dbProxy, brokerProxy string) []string {
	env := []string{"DATABASE_URL=" + s.databaseURL(database, s.proxies[dbProxy].Address())}
	if brokerProxy != "" {
		env = append(env, "AMQP_URL="+s.proxies[brokerProxy].URL(s.amqpURL))
	}
	return env
}
